"""How long the event loop's turns take, as whoever waits for it would notice."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Durations of the turns of the event loop. Whoever wants the loop waits for the turn under way."""

    def __init__(self) -> None:
        self._wall = array("d")
        self._cpu = array("d")

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Time every turn within the context by a callback in each, so that the loop never sleeps."""
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
        """Seconds."""
        return max(self._wall)

    def longest_on_cpu(self) -> float:
        """Seconds that the loop's thread worked in one turn; what the machine did in between does not count."""
        return max(self._cpu)

    def p99(self) -> float:
        """Seconds: at 99 of 100 random moments the turn under way is no longer."""
        rarest = sum(self._wall) * 0.01
        for duration in sorted(self._wall, reverse=True):
            rarest -= duration
            if rarest <= 0:
                return duration
        return 0.0
