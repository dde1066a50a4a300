"""Replays settings on traces whose arrivals vary with the seed, within a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from matrixinfer.config import SchedulerConfig
from matrixinfer.study import generators
from matrixinfer.study.fleet import Fleet
from matrixinfer.study.policies import profile
from matrixinfer.study.runs import replay
from matrixinfer.study.trace import LetterBlocks, Trace
from matrixinfer.study.tuning.space import Setting
from matrixinfer.study.workers import end_with_parent

GOALS: Sequence[str] = ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "latency_mean_s", "hit_rate")
_SHIFT = 5.0
"""Starts of sessions move by up to so many times the median gap between two."""
_FEWEST_TURNS = 200
_RUNS = 40
"""Replays that a search needs; a trace that is too long for so many is cut."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """A trace with its fleet. `generator` draws it with another seed, if it was drawn."""

    trace: Trace
    fleet: Fleet
    generator: str | None = None

    def with_seed(self, seed: int) -> Traffic:
        """The same kind of traffic by chance: drawn again, or with sessions that start a little earlier or later."""
        if seed == 0:
            return self
        fleet = dataclasses.replace(self.fleet, seed=self.fleet.seed + seed)
        if self.generator is not None:
            drawn = generators.generate(self.generator, seed=fleet.seed)
            return Traffic(trace=_first(drawn, len(self.trace.turns)), fleet=fleet)
        return Traffic(trace=_shifted(self.trace, seed), fleet=fleet)


class _OutOfTime(Exception):
    """Raised in a replay at the end of the time."""


class Runs:
    """Evaluates settings by `goal`, in `jobs` processes, until `ends_at` on the monotonic clock.

    Use as a context manager. `done` is called after each replay.
    """

    def __init__(
        self,
        traffic: Sequence[Traffic],
        goal: str,
        *,
        ends_at: float,
        jobs: int = 1,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self._traffic = traffic
        self._goal = goal
        self._ends_at = ends_at
        self._jobs = jobs
        self._done = done
        self._worker = _Worker(traffic, goal, ends_at)
        self._pool: ProcessPoolExecutor | None = None
        self._context: AbstractContextManager[ProcessPoolExecutor | None] = nullcontext()

    def __enter__(self) -> Runs:
        if self._jobs > 1:
            given = (self._traffic, self._goal, self._ends_at)
            self._context = ProcessPoolExecutor(self._jobs, get_context("spawn"), _begin, given)
        self._pool = self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)

    def __call__(self, settings: Sequence[Setting], seed: int) -> list[float | None]:
        """The value of each setting: the geometric mean over all traces; less is better."""
        configs = [setting.config for setting in settings]
        if self._pool is None:
            values: Iterator[float | None] = map(partial(self._worker.value, seed=seed), configs)
        else:
            values = self._pool.map(_value, configs, [seed] * len(configs))
        found = []
        for value in values:
            self._done()
            found.append(value)
        return found


def fitting(traffic: Sequence[Traffic], *, seconds: float) -> list[Traffic]:
    """Cut the traces so that a search takes about so many seconds: as many requests from the start as fit."""
    share = seconds / _RUNS / max(1, len(traffic))
    return [_fitting(each, share) for each in traffic]


def _fitting(traffic: Traffic, seconds: float) -> Traffic:
    began, turns = time.monotonic(), len(traffic.trace.turns)
    seen = 0

    def watch(done: int) -> None:
        nonlocal seen
        seen = done
        if time.monotonic() - began > 4 * seconds:
            raise _OutOfTime

    with suppress(_OutOfTime):
        replay(traffic.trace, traffic.fleet, profile("probe", SchedulerConfig()), progress=watch)
    taken = time.monotonic() - began
    fit = int(seen * seconds / taken) if taken > seconds else turns
    if fit >= turns:
        return traffic
    return dataclasses.replace(traffic, trace=_first(traffic.trace, max(fit, _FEWEST_TURNS)))


def _first(trace: Trace, turns: int) -> Trace:
    """The first requests. Each turn comes after the one that it depends on."""
    return trace if turns >= len(trace.turns) else dataclasses.replace(trace, turns=trace.turns[:turns])


def _shifted(trace: Trace, seed: int) -> Trace:
    draw = random.Random(seed)  # noqa: S311  # a simulation
    starts = sorted(turn.delay for turn in trace.turns if turn.after is None)
    gaps = sorted(later - sooner for sooner, later in itertools.pairwise(starts))
    reach = _SHIFT * (gaps[len(gaps) // 2] or sum(gaps) / len(gaps)) if gaps else 0.0
    shifts = {turn.session: draw.uniform(-reach, reach) for turn in trace.turns}
    turns = [
        dataclasses.replace(
            turn,
            delay=max(0.0, turn.delay + shifts[turn.session]) if turn.after is None else turn.delay,
            not_before=max(0.0, turn.not_before + shifts[turn.session]) if turn.not_before else 0.0,
        )
        for turn in trace.turns
    ]
    return dataclasses.replace(trace, turns=turns)


class _Worker:
    """What one process keeps between two replays: the traffic of the last seed, with its hashes."""

    def __init__(self, traffic: Sequence[Traffic], goal: str, ends_at: float) -> None:
        self._traffic = traffic
        self._goal = goal
        self._ends_at = ends_at
        self._seed: int | None = None
        self._seeded: list[tuple[Traffic, LetterBlocks]] = []

    def value(self, config: SchedulerConfig, seed: int) -> float | None:
        """One setting on all traces."""
        if seed != self._seed:
            self._seed, self._seeded = seed, [(each.with_seed(seed), LetterBlocks()) for each in self._traffic]
        logs = 0.0
        for traffic, blocks in self._seeded:
            try:
                outcome = replay(
                    traffic.trace, traffic.fleet, profile("tuned", config), blocks=blocks, progress=self._watch
                )
            except _OutOfTime:
                return None
            logs += math.log(_less_is_better(outcome.results, self._goal))
        return math.exp(logs / len(self._seeded))

    def _watch(self, _: int) -> None:
        if time.monotonic() > self._ends_at:
            raise _OutOfTime


_OF_PROCESS: list[_Worker] = []
"""The worker of a process in a pool, whose tasks must be functions of a module."""


def _begin(traffic: Sequence[Traffic], goal: str, ends_at: float) -> None:
    end_with_parent()
    _OF_PROCESS[:] = [_Worker(traffic, goal, ends_at)]


def _value(config: SchedulerConfig, seed: int) -> float | None:
    return _OF_PROCESS[0].value(config, seed)


def _less_is_better(results: Mapping[str, float | int | None], goal: str) -> float:
    value = results[goal]
    if value is None:
        return math.inf
    return max(1e-9, 1 - value if goal == "hit_rate" else value)
