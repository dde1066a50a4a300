"""`matrixinfer doctor --watch`: what counts as a change."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest

from matrixinfer.cli.doctor_watch import Examined, changes, watch
from matrixinfer.cli.terminal import Terminal
from matrixinfer.doctor.findings import Finding, Level, Summary, summarize
from tests.waiting import eventually


def finding(check: str, level: Level = "warning", *, pod: str | None = "a", message: str = "is late") -> Finding:
    return Finding(pod=pod, check=check, level=level, message=message, fix=None if level == "ok" else "restart it")


def test_new_problems_and_those_that_are_gone_are_changes() -> None:
    clock, feed, fine = finding("clock"), finding("feed", "blind"), finding("model", "ok")
    assert changes([clock, fine], [clock, fine]) == []
    assert changes([fine], [clock, fine]) == [(True, clock)]
    assert changes([clock, feed], [feed]) == [(False, clock)]
    worse = finding("clock", "blind")
    assert changes([clock], [worse]) == [(False, clock), (True, worse)]


def test_numbers_that_move_are_no_change() -> None:
    assert changes([finding("clock", message="3 s ahead")], [finding("clock", message="4 s ahead")]) == []


def test_one_more_of_a_kind_is_a_change() -> None:
    one, other = finding("tokens", message="chats differ"), finding("tokens", message="tools differ")
    assert changes([one], [one, other]) == [(True, other)]
    assert changes([one, other], [one]) == [(False, other)]


class Fleet:
    """Results of examinations, one after the other; the last one goes on."""

    def __init__(self, *results: list[Finding]) -> None:
        self.results = list(results)
        self.summaries: list[Summary] = []

    async def examine(self) -> Examined:
        found = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        return found, summarize(found, 1)


async def watched(fleet: Fleet, rounds: int, **options: Any) -> None:
    task = asyncio.create_task(watch(fleet.examine, every=0.01, on_summary=fleet.summaries.append, **options))
    try:
        await eventually(lambda: len(fleet.summaries) >= rounds)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_the_first_result_is_printed_whole_and_then_only_changes() -> None:
    shown: list[Summary] = []
    out = io.StringIO()
    feed = finding("feed", "blind", message="no events")
    fleet = Fleet([finding("clock")], [finding("clock")], [finding("clock"), feed], [finding("clock")])
    await watched(fleet, 6, show=lambda _, summary: shown.append(summary), console=Terminal(file=out))
    assert [summary.exit_code for summary in shown] == [1]
    assert [summary.exit_code for summary in fleet.summaries[:4]] == [1, 1, 2, 1]
    first, fix, last = out.getvalue().splitlines()
    assert first.split()[1:] == ["blind", "a:", "no", "events"]
    assert fix.strip() == "fix: restart it"
    assert last.split()[1:] == ["gone", "a:", "no", "events"]


async def test_with_json_each_result_is_a_line(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    fleet = Fleet([finding("clock")], [])
    await watched(fleet, 2, show=None, console=Terminal(file=io.StringIO()))
    lines = [json.loads(each) for each in capfdbinary.readouterr().out.splitlines()]
    assert [each["summary"]["exit_code"] for each in lines[:2]] == [1, 0]
    assert lines[0]["findings"][0]["check"] == "clock"
    assert lines[0]["at"]
