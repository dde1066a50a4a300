"""`matrixinfer tune`: which scheduler settings are best for a trace."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from matrixinfer.cli.arguments import Subparsers, at_least_one, duration
from matrixinfer.cli.fleet_arguments import add_fleet, add_traces, fleet_of, is_generator, trace_of, traces_of
from matrixinfer.cli.terminal import Rows, standard_output
from matrixinfer.errors import ConfigError
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.study.tuning.output import configuration, document, sentence, value_of
from matrixinfer.study.tuning.runs import GOALS, Runs, Traffic, fitting
from matrixinfer.study.tuning.search import Found, Search


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "tune",
        help="find the scheduler settings that are best for recorded traffic",
        description="Replay traffic with every ready-made profile and with changed numbers, compare the best ones with the "
        "default on several seeds, and print the winner as a configuration. See docs/replay.md.",
    )
    add_traces(parser)
    add_fleet(parser)
    parser.add_argument("--goal", choices=GOALS, default=GOALS[0], help="what to improve (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=duration, default=10.0, metavar="M", help="end after M minutes (default: %(default)g)"
    )
    parser.add_argument(
        "--seeds",
        type=at_least_one,
        default=8,
        metavar="N",
        help="seeds on which the best settings are compared with the default (default: %(default)s)",
    )
    parser.add_argument("--jobs", type=at_least_one, default=1, metavar="N", help="replays at the same time")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and no configuration")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the configuration to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search. Raises `ConfigError` and `TraceError`."""
    if args.output is not None and not args.output.resolve().parent.is_dir():
        raise ConfigError("--output", f"there is no folder {args.output.resolve().parent}")
    began, seconds = time.monotonic(), args.minutes * 60
    whole = [_traffic(text, args) for text in traces_of(args)]
    with _Shown() as shown:
        shown.stage("length of the traces", len(whole))
        traffic = fitting(whole, seconds=seconds * 0.9)
        with Runs(traffic, args.goal, ends_at=began + seconds, jobs=args.jobs, done=shown.done) as runs:
            search = Search(
                runs,
                discover(),
                left=lambda: max(0.0, 1 - (time.monotonic() - began) / seconds),
                seeds=args.seeds,
                at_once=args.jobs,
                stage=shown.stage,
            )
            found = search.run()
    traces = [
        {"name": each.trace.name, "requests": len(each.trace.turns), "of": len(all_of.trace.turns)}
        for each, all_of in zip(traffic, whole, strict=True)
    ]
    text = configuration(found, goal=args.goal, traces=[each.trace.name for each in traffic])
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    if args.json:
        print(msgspec.json.encode(document(found, goal=args.goal, traces=traces)).decode())
    else:
        _print(found, args, traffic, whole, text)
    return 0


def _traffic(text: str, args: argparse.Namespace) -> Traffic:
    trace = trace_of(text, args)
    return Traffic(trace=trace, fleet=fleet_of(trace, args), generator=text if is_generator(text) else None)


def _print(
    found: Found, args: argparse.Namespace, traffic: Sequence[Traffic], whole: Sequence[Traffic], text: str
) -> None:
    terminal = standard_output()
    for each, all_of in zip(traffic, whole, strict=True):
        turns, all_turns = len(each.trace.turns), len(all_of.trace.turns)
        part = "" if turns == all_turns else f"the first {turns} of "
        terminal.print(f"{each.trace.name}: {part}{all_turns} requests, {each.fleet.pods} pods")
    rows = Rows("setting", args.goal, "difference", "low", "high", "seeds", "verdict")
    rows.add_row(f"{found.default.setting.name} (default)", _number(value_of(found.default, args.goal)))
    for tried, gain in found.finalists:
        known = gain.seeds > 2
        rows.add_row(
            tried.setting.name,
            _number(value_of(tried, args.goal)),
            f"{gain.mean:+.1%}",
            f"{gain.low:+.1%}" if known else "-",
            f"{gain.high:+.1%}" if known else "-",
            str(gain.seeds),
            gain.verdict,
        )
    terminal.print(rows)
    terminal.print(f"{len(found.tried)} settings were tried. {sentence(found, args.goal)}")
    if not found.is_complete:
        terminal.print("The time did not suffice for the whole search: give it more --minutes, or --jobs.")
    if args.output is None:
        terminal.print("")
        sys.stdout.write(text)
    else:
        terminal.print(f"written: {args.output}; copy its section `scheduler` into your config file")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


class _Shown:
    """Progress on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> _Shown:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, count: int) -> None:
        """Something else is done now, in so many replays."""
        self._progress.add_task(name, total=count)

    def done(self) -> None:
        """One more replay is over."""
        if self._progress.task_ids:
            self._progress.advance(self._progress.task_ids[-1])
