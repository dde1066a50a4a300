"""Measures how long the event loop pauses: for that long no request, event or probe is served.

A timer fires twenty times a second. How much later than due it fires is how long something else held the loop. As far
as the loop's thread computed meanwhile, that was code that does not await, or a garbage collection; for the rest it was
other threads and processes, on a machine that is too small.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

WINDOW_SECONDS = 60
_TICK_SECONDS = 0.05


class Pauses:
    """The longest pause within the last `WINDOW_SECONDS`. Pure."""

    def __init__(self) -> None:
        self._longest: deque[tuple[int, float]] = deque()
        """By second: its longest pause, if no later second has a longer one."""

    def add(self, now: float, seconds: float) -> None:
        """A pause ended at `now`."""
        at = int(now)
        while self._longest and self._longest[-1][1] <= seconds:
            self._longest.pop()
        if not self._longest or self._longest[-1][0] != at:
            self._longest.append((at, seconds))
        self._expire(now)

    def __len__(self) -> int:
        """Pauses that are kept."""
        return len(self._longest)

    def longest(self, now: float) -> float:
        """Seconds; 0 without any."""
        self._expire(now)
        return self._longest[0][1] if self._longest else 0.0

    def _expire(self, now: float) -> None:
        while self._longest and now - self._longest[0][0] > WINDOW_SECONDS:
            self._longest.popleft()


class LoopWatch(Collector):
    """Watches the running loop while its context is open, and collects what it saw. `cpu_clock` is of the loop's thread."""

    def __init__(self, clock: Callable[[], float], cpu_clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._pauses = {"elapsed": Pauses(), "cpu": Pauses()}
        self._computed = 0.0
        self._due = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._wait(self._loop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._loop = self._timer = None

    def collect(self) -> Iterator[Metric]:
        """Read the loop now."""
        pause = GaugeMetricFamily(
            "matrixinfer_loop_pause_seconds",
            "Longest pause of the event loop within the last minute, and the longest time that it computed in one.",
            labels=["kind"],
        )
        for kind, pauses in self._pauses.items():
            pause.add_metric([kind], pauses.longest(self._clock()))
        yield pause
        tasks = 0 if self._loop is None else len(asyncio.all_tasks(self._loop))
        yield GaugeMetricFamily("matrixinfer_loop_tasks", "Tasks of the event loop.", value=tasks)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due, self._computed = self._clock() + _TICK_SECONDS, self._cpu_clock()
        self._timer = loop.call_later(_TICK_SECONDS, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = self._clock()
        pause = max(0.0, now - self._due)
        self._pauses["elapsed"].add(now, pause)
        self._pauses["cpu"].add(now, min(pause, self._cpu_clock() - self._computed))
        self._wait(loop)
