"""`matrixinfer doctor`: finds what would make KV-aware routing blind or wrong, and says how to fix it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from matrixinfer.cli import engine_arguments
from matrixinfer.cli.arguments import Subparsers, duration
from matrixinfer.cli.doctor_watch import STYLES, Examined, watch
from matrixinfer.cli.events.sources import until_stopped
from matrixinfer.cli.terminal import plain, standard_output
from matrixinfer.config import Config, LogConfig
from matrixinfer.doctor.checks import check_fleet
from matrixinfer.doctor.facts import FleetFacts
from matrixinfer.doctor.findings import EXIT_CODES, Finding, Summary, summarize
from matrixinfer.doctor.gather import gather_facts
from matrixinfer.errors import ConfigError
from matrixinfer.pods.discovery.discovery import listed_now
from matrixinfer.telemetry.log import configure

PROGRESS_AFTER_SECONDS = 1.0


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="find what would make KV-aware routing blind or wrong, and how to fix it",
        description="Connect to every engine and report what would make KV-aware routing blind or wrong, and how to fix "
        "it. A pod is blind when the gateway cannot know what it caches. The doctor sends one new prompt of a few hundred "
        "tokens twice to each pod, or to each of its data-parallel ranks: the pod's KV events must predict how much of the "
        "second prompt is found in the cache. Exit code: 0 no problems, 1 warnings, 2 a pod is blind, or nothing could be "
        "checked; with --watch, that of the last examination. As a probe, use --no-probe --fail-on blind.",
    )
    engine_arguments.add_arguments(parser)
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="send no prompts to the engines")
    parser.add_argument(
        "--patience",
        type=duration,
        default=5.0,
        metavar="S",
        help="seconds to wait for each answer, connection and event (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings and the summary as JSON")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=duration,
        const=60.0,
        metavar="S",
        help="examine again every S seconds (default: 60) until Ctrl-C, and print what has changed; with --json, one line "
        "per examination",
    )
    parser.add_argument(
        "--fail-on",
        choices=["warning", "blind"],
        default="warning",
        help="the mildest level for which the exit code is not 0 (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the fleet, print the findings and return the exit code. Raises `ConfigError`."""
    config = engine_arguments.configuration(args)
    configure(LogConfig(level="error", format="console"))  # findings report what matters
    if args.watch is not None:
        return asyncio.run(_watch(config, args))
    fleet = asyncio.run(_gather(config, args))
    findings = check_fleet(fleet)
    summary = summarize(findings, len(fleet.pods))
    if args.json:
        answer = {"findings": [asdict(finding) for finding in findings], "summary": asdict(summary)}
        print(msgspec.json.format(msgspec.json.encode(answer)).decode())
    else:
        _print(fleet.urls, findings, summary)
    return _exit_code(summary, args)


async def _watch(config: Config, args: argparse.Namespace) -> int:
    """Examine until a signal comes. Returns the exit code of the last examination."""
    last = 0
    urls: dict[str, str] = {}

    async def examine() -> Examined:
        fleet = await _gather(config, args)
        urls.update(fleet.urls)
        findings = check_fleet(fleet)
        return findings, summarize(findings, len(fleet.pods))

    def on_summary(summary: Summary) -> None:
        nonlocal last
        last = _exit_code(summary, args)

    show = None if args.json else partial(_print, urls)
    async with until_stopped(None):
        await watch(examine, every=args.watch, show=show, console=standard_output(), on_summary=on_summary)
    return last


def _exit_code(summary: Summary, args: argparse.Namespace) -> int:
    return 0 if summary.exit_code < EXIT_CODES[args.fail_on] else summary.exit_code


async def _with_listed(config: Config, seconds: float) -> Config:
    """The configuration with the pods that files and DNS names list now. Raises `ConfigError` if there are none at all."""
    names, urls = {pod.name for pod in config.pods}, {pod.url for pod in config.pods}
    listed = await listed_now(config.discovery.sources, seconds)
    pods = (*config.pods, *(pod for pod in listed if pod.name not in names and pod.url not in urls))
    if not pods:
        raise ConfigError("$.pods", "no engines: neither the file nor its sources name one")
    return msgspec.structs.replace(config, pods=pods)


async def _gather(config: Config, args: argparse.Namespace) -> FleetFacts:
    """Gather the facts. If that takes a while, a terminal shows the progress."""
    config = await _with_listed(config, args.patience)
    console = Console(stderr=True)
    status = console.status("")
    steps: dict[str, str] = {}

    def on_step(pod: str, step: str) -> None:
        steps[pod] = step
        done = sum(step == "done" for step in steps.values())
        status.update(escape(plain(f"{done} of {len(config.pods)} pods checked; {pod}: {step}")))

    start = asyncio.get_running_loop().call_later(PROGRESS_AFTER_SECONDS, status.start)
    try:
        return await gather_facts(config, probes=args.probe, patience=args.patience, on_step=on_step)
    finally:
        start.cancel()
        status.stop()


def _print(urls: Mapping[str, str], findings: Sequence[Finding], summary: Summary) -> None:
    console = standard_output()
    for pod, group in groupby(findings, key=lambda finding: finding.pod):
        console.print(Text(f"{pod}  {urls[pod]}" if pod is not None else "fleet", style="bold"))
        for finding in group:
            level = Text(f"{finding.level:8}", style=STYLES[finding.level])
            console.print(Text("  ").append_text(level).append(finding.message))
            if finding.fix is not None:
                console.print(Text(f"          fix: {finding.fix}"))
        console.print()
    pods = "1 pod" if summary.pods == 1 else f"{summary.pods} pods"
    if summary.exit_code == 0:
        console.print(Text(f"{pods}: no problems found", style="green"))
    else:
        console.print(Text(f"{pods}: {summary.blind} blind, {summary.warning} warning, {summary.ok} ok"))
