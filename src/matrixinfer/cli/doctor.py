"""`matrixinfer doctor`: what would make KV-aware routing blind or wrong, and what mends it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

import msgspec
from rich.console import Console
from rich.text import Text

from matrixinfer.cli import engine_arguments
from matrixinfer.cli.arguments import Subparsers, duration
from matrixinfer.config import Config, LogConfig
from matrixinfer.doctor.checks import diagnose
from matrixinfer.doctor.facts import FleetFacts
from matrixinfer.doctor.findings import Finding, Level, Summary, sum_up
from matrixinfer.doctor.gather import examine
from matrixinfer.telemetry.log import configure

PROGRESS_AFTER_SECONDS = 1.0
_STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "blind": "bold red"}


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="what would make routing blind, and what mends it",
        description="Connect to every engine and say in plain words what would make KV-aware routing blind or wrong, with "
        "what mends it. Each pod, and each of its data-parallel ranks, gets a new prompt of some hundred tokens twice: its "
        "events must foretell what the second finds in the cache. Exit code: 0 all is well, 1 warnings, 2 routing to some "
        "pod would be blind, or nothing can be examined.",
    )
    engine_arguments.add_arguments(parser)
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="send no prompts")
    parser.add_argument(
        "--patience",
        type=duration,
        default=5.0,
        metavar="S",
        help="seconds that each answer, connection and event may take (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings and the summary as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine, print, and give the exit code. Raises `ConfigError`."""
    config = engine_arguments.configuration(args)
    configure(LogConfig(level="error", format="console"))  # the findings say it all
    fleet = asyncio.run(_examine(config, args))
    findings = diagnose(fleet)
    summary = sum_up(findings, len(fleet.pods))
    if args.json:
        answer = {"findings": [asdict(finding) for finding in findings], "summary": asdict(summary)}
        print(msgspec.json.format(msgspec.json.encode(answer)).decode())
    else:
        _print(fleet, findings, summary)
    return summary.exit_code


async def _examine(config: Config, args: argparse.Namespace) -> FleetFacts:
    """Show on a terminal what is going on, where it takes longer."""
    console = Console(stderr=True)
    status = console.status("")
    doing: dict[str, str] = {}

    def on_step(pod: str, step: str) -> None:
        doing[pod] = step
        done = sum(step == "done" for step in doing.values())
        status.update(f"{done} of {len(config.pods)} pods examined; {pod}: {step}")

    start = asyncio.get_running_loop().call_later(PROGRESS_AFTER_SECONDS, status.start)
    try:
        return await examine(config, probes=args.probe, patience=args.patience, on_step=on_step)
    finally:
        start.cancel()
        status.stop()


def _print(fleet: FleetFacts, findings: Sequence[Finding], summary: Summary) -> None:
    console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
    urls = {pod.name: pod.url for pod in fleet.pods}
    for pod, group in groupby(findings, key=lambda finding: finding.pod):
        console.print(Text(f"{pod}  {urls[pod]}" if pod is not None else "the fleet", style="bold"))
        for finding in group:
            mark = Text(f"{finding.level:8}", style=_STYLES[finding.level])
            console.print(Text("  ").append_text(mark).append(finding.says))
            if finding.fix is not None:
                console.print(Text(f"          fix: {finding.fix}"))
        console.print()
    pods = "1 pod" if summary.pods == 1 else f"{summary.pods} pods"
    if summary.exit_code == 0:
        console.print(Text(f"{pods}: all is well", style="green"))
    else:
        console.print(Text(f"{pods}: {summary.blind} blind, {summary.warning} warning, {summary.ok} ok"))
