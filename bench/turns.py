"""Durations of the event loop's turns, which is how long a task may have to wait for it."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Measures the turns of the event loop. A task that becomes ready waits for the current turn to end."""

    def __init__(self) -> None:
        self._wall = array("d")
        self._cpu = array("d")

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure every turn within the context, by a callback in each. The loop never sleeps meanwhile."""
        loop, watching = asyncio.get_running_loop(), True
        wall, cpu = time.perf_counter(), time.thread_time()

        def beat() -> None:
            nonlocal wall, cpu
            if not watching:
                return
            wall_before, wall, cpu_before, cpu = wall, time.perf_counter(), cpu, time.thread_time()
            self._wall.append(wall - wall_before)
            self._cpu.append(cpu - cpu_before)
            loop.call_soon(beat)

        loop.call_soon(beat)
        try:
            yield
        finally:
            watching = False

    def longest(self) -> float:
        """The longest turn, in seconds."""
        return max(self._wall)

    def longest_on_cpu(self) -> float:
        """The longest CPU time of the loop's thread in one turn, in seconds. Other processes do not affect it."""
        return max(self._cpu)

    def p99(self) -> float:
        """Seconds: at 99 of 100 random moments, the current turn is at most this long."""
        rarest = sum(self._wall) * 0.01
        for duration in sorted(self._wall, reverse=True):
            rarest -= duration
            if rarest <= 0:
                return duration
        return 0.0
