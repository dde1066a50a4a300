"""`matrixinfer replay`: compares routing policies on recorded or generated traffic."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from matrixinfer import __version__
from matrixinfer.cli.arguments import Subparsers, at_least_one
from matrixinfer.cli.fleet_arguments import add_fleet, add_traces, fleet_of, trace_of, traces_of
from matrixinfer.cli.ladder import print_ladders
from matrixinfer.cli.terminal import Rows, standard_output
from matrixinfer.errors import ConfigError
from matrixinfer.study import generators, presets
from matrixinfer.study.fleet import Fleet
from matrixinfer.study.plots import plot, require_matplotlib
from matrixinfer.study.policies import POLICIES, chosen
from matrixinfer.study.report.page import Chapter, page
from matrixinfer.study.runs import Outcome, replay_all
from matrixinfer.study.trace import LetterBlocks, Trace

_DEFAULT_POLICIES = "round_robin,least_request,session_sticky,prefix_hash,lmetric,kv_aware,pooled"
_COLUMNS = ("hit_rate", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_s", "imbalance")


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "replay",
        help="replay recorded traffic on a simulated fleet, and compare routing policies",
        description="Replay traffic in virtual time: the gateway's own index, feeds and scheduler against a model of the "
        "engine. A TRACE is a file, or the name of a generator. See docs/replay.md.",
    )
    add_traces(parser)
    parser.add_argument("--list", action="store_true", help="print the policies, engines and generators")
    add_fleet(parser)
    parser.add_argument(
        "--policies", default=_DEFAULT_POLICIES, metavar="A,B,…", help="policies to compare (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=at_least_one, default=1, metavar="N", help="policies to replay at the same time")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each trace")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write plots to DIR, in a folder for each trace")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page that says what to do, with plots, to the HTML file FILE",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay all traces. Raises `ConfigError` and `TraceError`."""
    if args.list:
        _list()
        return 0
    policies = chosen(args.policies)
    if args.report is not None and not args.report.resolve().parent.is_dir():
        raise ConfigError("--report", f"there is no folder {args.report.resolve().parent}")
    if args.plot is not None:
        require_matplotlib()
    chapters = []
    for text in traces_of(args):
        trace = trace_of(text, args)
        fleet = fleet_of(trace, args)
        with _Shown(trace, [policy.name for policy in policies]) as shown:
            done = {each.policy: each for each in replay_all(trace, fleet, policies, jobs=args.jobs, progress=shown.at)}
        outcomes = [done[policy.name] for policy in policies]
        settings = _settings(args, trace, fleet)
        if args.json:
            _print_json(trace, settings, outcomes)
        else:
            _print_table(trace, settings, outcomes)
        if args.plot is not None:
            files = plot(outcomes, args.plot / _folder(trace.name), trace.name)
            print(f"plots: {', '.join(map(str, files))}", file=sys.stderr)
        if args.report is not None:
            chapters.append(Chapter(trace=trace.name, settings=settings, outcomes=outcomes))
    if args.report is not None:
        args.report.write_text(page(chapters), encoding="utf-8")
        print(f"report: {args.report}", file=sys.stderr)
    return 0


def _settings(args: argparse.Namespace, trace: Trace, fleet: Fleet) -> dict[str, object]:
    return {
        "version": __version__,
        "engine": args.engine,
        "pods": fleet.pods,
        "kv_tokens_per_pod": fleet.pod_tokens,
        "gateways": fleet.gateways,
        "gossip": fleet.gossip,
        "shared_index": fleet.shared_index,
        "rate_scale": fleet.rate_scale,
        "seed": fleet.seed,
        "event_delay_s": fleet.event_delay,
        "event_loss": fleet.event_loss,
        "faults": args.fault,
        "requests": len(trace.turns),
        "ideal_hit_rate": round(trace.ideal_hit_rate(LetterBlocks()), 4),
        "trace": dict(trace.settings),
    }


def _print_json(trace: Trace, settings: dict[str, object], outcomes: Sequence[Outcome]) -> None:
    line = {
        "trace": trace.name,
        "settings": settings,
        "results": {outcome.policy: {**outcome.results, "ladder": outcome.ladder} for outcome in outcomes},
    }
    print(msgspec.json.encode(line).decode())


def _print_table(trace: Trace, settings: dict[str, object], outcomes: Sequence[Outcome]) -> None:
    terminal = standard_output()
    terminal.print(
        f"{trace.name}: {settings['requests']} requests, {settings['pods']} pods of {settings['kv_tokens_per_pod']} KV tokens "
        f"({settings['engine']}), ideal hit rate {settings['ideal_hit_rate']}"
    )
    recorded = trace.settings.get("recorded")
    if isinstance(recorded, dict):
        shown = ", ".join(f"{name} {_cell(value)}" for name, value in recorded.items())
        terminal.print(f"as recorded: {shown}")
    rows = Rows("policy", *_COLUMNS)
    for outcome in outcomes:
        rows.add_row(outcome.policy, *(_cell(outcome.results[column]) for column in _COLUMNS))
    terminal.print(rows)
    terminal.print()
    print_ladders(terminal, {outcome.policy: outcome.ladder for outcome in outcomes})
    rejected = outcomes[0].results["too_long"] if outcomes else 0
    if rejected:
        terminal.print(f"{rejected} requests are longer than the KV cache of a pod, and were left out")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _list() -> None:
    terminal = standard_output()
    policies = Rows("policy", "summary", "source")
    for policy in POLICIES.values():
        policies.add_row(policy.name, policy.summary, policy.source or "")
    terminal.print(policies)
    engines = Rows("engine", "summary")
    for name, preset in presets.presets().items():
        engines.add_row(name, preset.summary)
    terminal.print("", engines)
    makers = Rows("generator", "summary", "parameters")
    for name, generator in generators.GENERATORS.items():
        makers.add_row(
            name, generator.summary, ", ".join(f"{key}={value:g}" for key, value in generator.defaults.items())
        )
    terminal.print("", makers)


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


class _Shown:
    """Progress bars on standard error, if that is a terminal."""

    def __init__(self, trace: Trace, policies: Sequence[str]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self._total = len(trace.turns)
        self._tasks = {name: self._progress.add_task(name, total=self._total) for name in policies}
        self._every = max(1, self._total // 200)

    def __enter__(self) -> _Shown:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def at(self, policy: str, done: int) -> None:
        """So many requests of a policy are over."""
        if done % self._every == 0 or done == self._total:
            self._progress.update(self._tasks[policy], completed=done)
