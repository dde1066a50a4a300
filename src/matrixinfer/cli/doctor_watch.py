"""`matrixinfer doctor --watch`: examines the fleet again and again, and prints what has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TypeAlias

from rich.text import Text

from matrixinfer.cli import json_lines
from matrixinfer.cli.terminal import Terminal
from matrixinfer.doctor.findings import Finding, Level, Summary

STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "blind": "bold red"}
_Key: TypeAlias = tuple[str | None, str, Level]
Examined: TypeAlias = tuple[Sequence[Finding], Summary]


async def watch(
    examine: Callable[[], Awaitable[Examined]],
    *,
    every: float,
    show: Callable[[Sequence[Finding], Summary], None] | None,
    console: Terminal,
    on_summary: Callable[[Summary], None],
) -> None:
    """Examine every `every` seconds until this is cancelled; `on_summary` gets each result.

    `show` prints the first result; later ones are printed as changes. Without `show`, every result is a line of JSON.
    """
    before: Sequence[Finding] | None = None
    while True:
        findings, summary = await examine()
        on_summary(summary)
        if show is None:
            answer: dict[str, object] = {"at": datetime.now().astimezone().isoformat(timespec="seconds")}
            json_lines.write(answer | {"findings": [asdict(each) for each in findings], "summary": asdict(summary)})
        elif before is None:
            show(findings, summary)
        else:
            _print_changes(console, changes(before, findings))
        before = findings
        await asyncio.sleep(every)


def changes(before: Sequence[Finding], after: Sequence[Finding]) -> list[tuple[bool, Finding]]:
    """Problems that are new (True), and those that are gone (False), in the order of the findings."""
    old, new = _problems(before), _problems(after)
    gone = [(False, each) for key, found in old.items() for each in found[len(new.get(key, ())) :]]
    return gone + [(True, each) for key, found in new.items() for each in found[len(old.get(key, ())) :]]


def _problems(findings: Sequence[Finding]) -> dict[_Key, list[Finding]]:
    """By what makes a problem the same one: its words may carry numbers that move."""
    found: dict[_Key, list[Finding]] = {}
    for each in findings:
        if each.level != "ok":
            found.setdefault((each.pod, each.check, each.level), []).append(each)
    return found


def _print_changes(console: Terminal, found: Sequence[tuple[bool, Finding]]) -> None:
    at = datetime.now().astimezone().strftime("%H:%M:%S")
    for is_new, each in found:
        level = Text(f"{each.level:8}" if is_new else "gone    ", style=STYLES[each.level] if is_new else STYLES["ok"])
        where = each.pod or "fleet"
        console.print(Text(f"{at}  ").append_text(level).append(f"{where}: {each.message}"))
        if is_new and each.fix is not None:
            console.print(Text(f"                    fix: {each.fix}"))
