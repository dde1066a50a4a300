"""`matrixinfer events`: looks at KV events as engines publish them."""

from __future__ import annotations

import argparse
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matrixinfer.cli.arguments import Subparsers
from matrixinfer.kvevents.capture import CaptureError, CaptureReport, check_capture


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    events = subparsers.add_parser("events", help="look at KV events as engines publish them")
    commands = events.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="do the recorded events predict the recorded hits?",
        description="Replay captures of raw frames through the event core and compare the hit that it predicts for "
        "each request with the one that the engine reported. Exit code 1 when any differ.",
    )
    check.add_argument("captures", nargs="+", type=Path, metavar="CAPTURE", help="JSON lines, plain or gzipped")
    check.add_argument(
        "--block-size", type=int, metavar="N", help="blockSizeToHash (default: the engine's own block size)"
    )
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Check captures; 0 when every prediction holds."""
    if args.block_size is not None and args.block_size < 1:
        raise CaptureError("--block-size must be at least 1")
    reports = [(str(path), _check(path, args.block_size)) for path in args.captures]
    if args.json:
        print(json.dumps({"files": [{"file": name, **asdict(report)} for name, report in reports]}, indent=2))
    else:
        for name, report in reports:
            _print(name, report)
    return 1 if any(report.mismatches for _, report in reports) else 0


def _check(path: Path, block_size: int | None) -> CaptureReport:
    try:
        return check_capture(_rows(path), block_size=block_size)
    except (CaptureError, OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CaptureError(f"{path}: {error}") from error


def _print(name: str, report: CaptureReport) -> None:
    verdict = f"{len(report.mismatches)} mismatches" if report.mismatches else "every hit as predicted"
    print(f"{name}: {report.frames} frames, {report.events} events, {report.requests} requests: {verdict}")
    for label in report.unsupported:
        print(f"  {label}: not predictable from its events")
    for mismatch in report.mismatches:
        print(f"  {mismatch.label}: predicted {mismatch.predicted} cached tokens, engine reported {mismatch.actual}")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    gzipped = path.suffix == ".gz"
    with gzip.open(path, "rt", encoding="utf-8") if gzipped else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise CaptureError(f"line {number}: expected a JSON object")
            yield row
