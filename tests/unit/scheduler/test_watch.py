"""What the scheduler reports about plugins that fail or are slow."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest

from matrixinfer.scheduler.framework import Candidate, Decision, SchedulingRequest, Scores, Services
from matrixinfer.scheduler.plugins import BUILT_IN
from matrixinfer.scheduler.scheduler import Scheduler

from .support import FakeClock, pods, profile, request
from .test_scheduler import own, scoring


class Watch:
    def __init__(self) -> None:
        self.failures: list[tuple[str, str, str, str]] = []
        self.delays: list[tuple[str, str, float]] = []

    def failed(self, plugin: str, stage: str, error: BaseException, reason: str) -> None:
        self.failures.append((plugin, stage, type(error).__name__, reason))

    def slow(self, plugin: str, stage: str, seconds: float) -> None:
        self.delays.append((plugin, stage, seconds))


class Rig:
    """A plugin `mine` that does the given thing at each stage, and a good scorer."""

    def __init__(self, *, slow_seconds: float = 0.05) -> None:
        self.clock, self.watch = FakeClock(), Watch()
        self.raises: dict[str, BaseException] = {}
        self.takes: dict[str, float] = {}
        mine = own(
            "mine",
            filter=lambda _, c: self._call("Filter", [None] * len(c)),
            score=lambda _, c: self._call("Score", Scores(values=[0.0] * len(c))),
            pick=lambda _, c, totals: self._call("Picker", range(len(c))),
            post_schedule=lambda _, decision: self._call("PostSchedule", None),
        )
        config = profile(filters=["mine"], scorers=["mine", "good"], pickers=["mine"], listeners=["mine"])
        config = msgspec.structs.replace(config, slow_plugin_seconds=slow_seconds)
        registry = {**BUILT_IN, "mine": mine, "good": scoring("good", 1, 2)}
        services = Services(clock=self.clock, rng=random.Random(0))
        self.scheduler = Scheduler(config, services, registry, watch=self.watch)

    def _call(self, stage: str, answer: Any) -> Any:
        self.clock.now += self.takes.get(stage, 0.0)
        if stage in self.raises:
            raise self.raises[stage]
        return answer

    def decide(self, *, dry_run: bool = False) -> Decision:
        asked: SchedulingRequest = request()
        candidates: list[Candidate] = pods(2)
        return self.scheduler.schedule(asked, candidates, dry_run=dry_run)


STAGES = ("Filter", "Score", "Picker", "PostSchedule")
FAILURES = (ValueError("words"), SystemExit(1), GeneratorExit(), asyncio.CancelledError(), RecursionError())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_whatever_a_plugin_raises_is_reported_and_the_request_is_routed(stage: str, error: BaseException) -> None:
    rig = Rig()
    rig.raises[stage] = error
    assert len(rig.decide().ranked) == 2
    ((plugin, at, kind, reason),) = rig.watch.failures
    assert (plugin, at, kind) == ("mine", stage, type(error).__name__)
    assert reason.startswith(f"raised {type(error).__name__} at test_watch.py:")
    assert rig.scheduler.rejected == {"mine": 1, "good": 0}


@pytest.mark.parametrize("stage", STAGES)
def test_a_user_who_interrupts_is_obeyed(stage: str) -> None:
    rig = Rig()
    rig.raises[stage] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        rig.decide()
    assert not rig.watch.failures


@pytest.mark.parametrize("stage", STAGES)
def test_a_call_that_takes_too_long_is_reported_and_counted(stage: str) -> None:
    rig = Rig(slow_seconds=0.5)
    rig.takes[stage] = 0.75
    rig.decide()
    assert rig.watch.delays == [("mine", stage, 0.75)]
    assert rig.scheduler.slow == {"mine": 1, "good": 0}
    assert rig.scheduler.rejected == {"mine": 0, "good": 0}


def test_the_limit_holds_for_one_call_and_includes_its_own_value() -> None:
    rig = Rig(slow_seconds=0.5)
    rig.takes = dict.fromkeys(STAGES, 0.5)
    rig.decide()
    assert not rig.watch.delays


def test_a_slow_failure_is_both() -> None:
    rig = Rig(slow_seconds=0.5)
    rig.takes["Score"], rig.raises["Score"] = 1.0, ValueError()
    rig.decide()
    assert (len(rig.watch.failures), len(rig.watch.delays)) == (1, 1)


def test_a_dry_run_reports_but_counts_nothing() -> None:
    rig = Rig(slow_seconds=0.5)
    rig.takes["Score"], rig.raises["Score"] = 1.0, ValueError()
    rig.decide(dry_run=True)
    assert (len(rig.watch.failures), len(rig.watch.delays)) == (1, 1)
    assert not any((*rig.scheduler.rejected.values(), *rig.scheduler.slow.values()))


class Unreadable(Exception):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no attribute of a foreign error is safe")


class Unclassed(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise SystemExit


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [Unreadable, Unclassed])
def test_an_error_that_cannot_be_read_is_reported_and_the_request_is_routed(
    stage: str, error: type[BaseException]
) -> None:
    rig = Rig()
    rig.raises[stage] = error()
    assert len(rig.decide().ranked) == 2
    ((_, at, _, reason),) = rig.watch.failures
    assert (at, reason) == (stage, "raised an error that cannot be read")
