"""`matrixinfer calibrate`: fits the model of an engine to a live one."""

from __future__ import annotations

import argparse
import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from matrixinfer.cli.arguments import Subparsers, add_engine_key, at_least_one, duration, engine_key
from matrixinfer.errors import ConfigError
from matrixinfer.pods.session import client_session
from matrixinfer.study.calibration.fit import CalibrationError, fit
from matrixinfer.study.calibration.measure import Engine, Measured, look, measure
from matrixinfer.study.calibration.plan import Plan, plan
from matrixinfer.study.calibration.preset import preset_of, yaml_of

_OWN_FLAG = "given to matrixinfer calibrate; must be the engine's own setting"


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a live engine, for replays that model it",
        description="Send an idle engine a bounded set of requests, and print a preset with its times that `matrixinfer "
        "replay --engine FILE` and `matrixinfer tune --engine FILE` accept. Says first what it will send. See docs/replay.md.",
    )
    parser.add_argument("--engine", required=True, metavar="URL", help="base URL of the engine, without /v1")
    parser.add_argument(
        "--minutes", type=duration, default=3.0, metavar="M", help="end after M minutes (default: %(default)g)"
    )
    parser.add_argument(
        "--longest", type=at_least_one, default=8192, metavar="TOKENS", help="longest prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--together", type=at_least_one, default=32, metavar="N", help="most requests at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=at_least_one,
        default=8192,
        metavar="TOKENS",
        help="the engine's own limit of tokens per step, which it does not report (default: %(default)s)",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=at_least_one,
        default=256,
        metavar="N",
        help="the engine's own limit of sequences, which it does not report (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-tokens", type=at_least_one, metavar="TOKENS", help="size of the KV cache (default: as the engine reports)"
    )
    add_engine_key(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask, also while the engine serves others")
    parser.add_argument("--json", action="store_true", help="print the preset as JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the preset to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure. Raises `CalibrationError` and `ConfigError`."""
    if args.output is not None and not args.output.resolve().parent.is_dir():
        raise ConfigError("--output", f"there is no folder {args.output.resolve().parent}")
    if args.max_num_seqs >= args.max_num_batched_tokens:
        raise ConfigError("--max-num-seqs", f"expected less than {args.max_num_batched_tokens} tokens per step")
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    key = engine_key(args)
    async with client_session(lambda _: key) as session:
        engine = await look(session, args.engine.rstrip("/").removesuffix("/v1"))
        kv_tokens, block_size = args.kv_tokens or engine.metrics.cache_tokens, engine.metrics.block_size
        if kv_tokens is None:
            raise ConfigError("--kv-tokens", f"expected a number, since {engine.url}/metrics does not say it")
        planned = plan(engine.limits(args.max_num_seqs), longest=args.longest, most_together=args.together)
        if not await _may_begin(engine, planned, args):
            return 1
        with Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("measuring", total=len(planned.tasks))
            measured = await measure(
                session,
                engine,
                planned,
                seconds=args.minutes * 60,
                done=lambda number: progress.update(bar, completed=number),
            )
    found = fit(measured.prefills, measured.decodes, max_tokens=args.max_num_batched_tokens)
    notes = {"max_tokens": _OWN_FLAG, "max_sequences": _OWN_FLAG}
    if args.kv_tokens is not None:
        notes["kv_tokens"] = _OWN_FLAG
    preset = preset_of(
        found,
        model=engine.model,
        url=engine.url,
        when=f"{datetime.now(UTC):%Y-%m-%d}",
        block_size=block_size or 16,
        kv_tokens=kv_tokens,
        max_tokens=args.max_num_batched_tokens,
        max_sequences=args.max_num_seqs,
        notes=notes,
    )
    text = yaml_of(preset, model=engine.model)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    sys.stdout.write(msgspec.json.encode(preset).decode() + "\n" if args.json else text if args.output is None else "")
    _say(measured, planned, found.typical_error, found.worst_error, found.overhead)
    return 0


async def _may_begin(engine: Engine, planned: Plan, args: argparse.Namespace) -> bool:
    """Say what will be sent, and ask where somebody can answer. An engine that serves others is left alone."""
    print(
        f"{engine.url} ({engine.model}) will get {planned.requests} requests with {planned.tokens:,} tokens, up to "
        f"{planned.together} at a time, for at most {args.minutes:g} minutes. Its cache then holds random prompts.",
        file=sys.stderr,
    )
    if args.yes:
        return True
    if engine.is_busy:
        raise CalibrationError(
            f"{engine.url} is serving requests, which would wait longer and spoil the figures: use an idle engine, or --yes"
        )
    if not sys.stdin.isatty():
        return True
    print("Continue? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = await asyncio.to_thread(sys.stdin.readline)
    return answer.strip().lower() in ("y", "yes")


def _say(measured: Measured, planned: Plan, typical: float, worst: float, overhead: float) -> None:
    """How good the fit is."""
    print(
        f"Half of the measurements are within {typical:.0%} of the model, all within {worst:.0%}; a request spends "
        f"{overhead * 1000:.1f} ms outside of steps, which the preset leaves out.",
        file=sys.stderr,
    )
    if measured.was_cut:
        print("The time ended before all was measured: give it more --minutes.", file=sys.stderr)
    if measured.others:
        print(
            f"The engine served others in {measured.others} of {len(planned.tasks)} looks: measure again.",
            file=sys.stderr,
        )
