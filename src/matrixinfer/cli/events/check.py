"""`matrixinfer events check`: replays captures and compares predicted with reported hits."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matrixinfer.cli.arguments import Subparsers, at_least_one
from matrixinfer.errors import MatrixInferError
from matrixinfer.feedtools.capture import CaptureReport, Mismatch, PublisherReport, check_capture
from matrixinfer.feedtools.capture_file import CaptureReader
from matrixinfer.feedtools.describe import plural, shown, tallied
from matrixinfer.feedtools.mutate import MUTATIONS

LABELS_SHOWN = 3
"""Requests named for each reason for which their hits cannot be predicted; `--json` names all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of checking one file."""

    file: str
    error: str | None = None
    truncated: bool = False
    """The file ends in the middle of a row. It was checked up to there."""
    report: CaptureReport | None = None
    """The check without a mutation; None when the file cannot be checked."""
    mutated: CaptureReport | None = None
    """The check with the mutation, if one was requested."""

    @property
    def detected(self) -> list[Mismatch]:
        """Mismatches that only the mutation causes."""
        if self.report is None or self.mutated is None:
            return []
        return [
            mismatch
            for mismatch in self.mutated.mismatches
            if mismatch not in self.report.mismatches and mismatch.label not in self.report.unsupported
        ]

    @property
    def exit_code(self) -> int:
        """0 when every hit was predicted and every frame read or, with a mutation, when the mutation was detected."""
        if self.report is None:
            return 2
        report = self.report
        passed = self.detected if self.mutated is not None else not report.mismatches and not report.unreadable
        return 0 if passed else 1


def add_parser(commands: Subparsers) -> None:
    """Register the command."""
    check = commands.add_parser(
        "check",
        help="check that recorded events predict the recorded hits",
        description="Replay captures through the gateway's own event handling, and compare the hit that it predicts for "
        "each recorded request with the hit that the engine reported. Exit code: 0 all equal, 1 a hit differs or a frame "
        "cannot be read, 2 a file cannot be checked.",
    )
    check.add_argument(
        "captures", nargs="+", type=Path, metavar="CAPTURE", help="capture file: JSON lines, plain or gzipped"
    )
    check.add_argument(
        "--block-size",
        type=at_least_one,
        metavar="N",
        help="tokens per hashed block, as `blocks.size` (default: the engine's block size)",
    )
    check.add_argument(
        "--mutate",
        choices=tuple(MUTATIONS),
        help="misread the events on purpose, to see that the check detects it: `copies` counts all copies of a block as "
        "one, `clear` and `removed` ignore those events, `salt` ignores salts and other extra keys, `groups` all attention "
        "groups but one, `window` the sizes of sliding windows, `lookahead` the tokens after a block. Exit code 0 when "
        "every file detects it, 1 when one does not",
    )
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check every file, even when another one cannot be checked."""
    results = [_check(path, args.block_size, args.mutate) for path in args.captures]
    if args.json:
        print(json.dumps({"files": [_value(result, args.mutate) for result in results]}, indent=2))
    for result in results:
        if result.error is not None:
            print(f"matrixinfer: {result.file}: {result.error}", file=sys.stderr)
        elif not args.json:
            print("\n  ".join(_lines(result, args.mutate)))
    return max(result.exit_code for result in results)


def _check(path: Path, block_size: int | None, mutation: str | None) -> Result:
    rows = CaptureReader(path)
    try:
        report = check_capture(rows, block_size=block_size)
        mutated = mutation and check_capture(rows, block_size=block_size, make_ledger=MUTATIONS[mutation])
    except MatrixInferError as error:
        return Result(file=str(path), error=str(error))
    return Result(file=str(path), truncated=rows.cut, report=report, mutated=mutated or None)


def _value(result: Result, mutation: str | None) -> dict[str, Any]:
    report = result.report if result.mutated is None else result.mutated
    if report is None:
        return {"file": result.file, "error": result.error}
    value = {"file": result.file, "truncated": result.truncated, **asdict(report)}
    for publisher in value["publishers"]:
        if not publisher["limits"]:
            del publisher["limits"]
    if mutation is not None:
        value |= {"mutation": mutation, "detected": len(result.detected)}
    return value


def _lines(result: Result, mutation: str | None) -> list[str]:
    """The result as text, one line per fact."""
    report = result.report
    if report is None:
        return []
    counts = [(report.frames, "frame"), (report.events, "event"), (report.requests, "request")]
    first = f"{result.file}: {', '.join(plural(*count) for count in counts)}: "
    if mutation is not None:
        found = result.detected
        first += f"`{mutation}` makes {plural(len(found), 'hit')} differ" if found else f"`{mutation}` was not detected"
        return [first, *map(_difference, found)]
    lines = [first + _verdict(report)]
    lines += ["the file is truncated: checked up to its last complete row"] * result.truncated
    lines += [_feed(publisher) for publisher in report.publishers]
    lines += _unsupported(report)
    return lines + [_difference(mismatch) for mismatch in report.mismatches]


def _verdict(report: CaptureReport) -> str:
    left_out = f"; {plural(len(report.unsupported), 'more request')} cannot be predicted" if report.unsupported else ""
    if not report.requests:
        return f"no requests to compare{left_out}"
    if report.mismatches:
        return (f"{len(report.mismatches)} mismatches" if len(report.mismatches) > 1 else "1 mismatch") + left_out
    return f"every hit was predicted{left_out}"


def _unsupported(report: CaptureReport) -> Iterator[str]:
    """The requests that cannot be predicted, a line for each reason."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for label, reason in report.unsupported.items():
        by_reason[reason].append(shown(label))
    for reason, labels in by_reason.items():
        rest = len(labels) - LABELS_SHOWN
        named = ", ".join(labels[:LABELS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
        yield f"{named}: cannot be predicted: {reason}"


def _difference(mismatch: Mismatch) -> str:
    return (
        f"{shown(mismatch.label)}: predicted {mismatch.predicted} cached tokens, the engine reported {mismatch.actual}"
    )


def _feed(publisher: PublisherReport) -> str:
    words = [f"{plural(publisher.blocks, 'engine block')} cached at the end"]
    if publisher.name:
        counts = f"{plural(publisher.frames, 'frame')}, {plural(publisher.events, 'event')}"
        words[0] = f"publisher {shown(publisher.name)}: {counts}, {words[0]}"
    words += tallied(
        (publisher.gaps, "gap"),
        (publisher.restarts, "restart"),
        (publisher.malformed, "unreadable frame"),
        (publisher.unreadable, "unreadable event"),
        (publisher.misfits, "misfit event"),
        (publisher.orphans, "orphan block"),
    )
    words += [f"limit: {limit}" for limit in publisher.limits]
    if publisher.untrusted is not None:
        words.append(f"not trusted: {publisher.untrusted}")
    return "; ".join(words)
