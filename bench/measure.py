"""Timing. As other processes disturb it, a time is the best of short rounds, and a ratio compares adjacent rounds."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured value."""

    case: str
    """What was measured: a row of the table."""
    name: str
    value: float
    unit: str
    target: float | None = None
    """The value must not exceed this. None without a target."""

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.value <= self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much to measure."""

    rounds: int = 7
    round_seconds: float = 0.02
    """Calls are repeated until a round lasts this long."""
    index_blocks: int = 1_000_000
    prompt_kib: tuple[int, ...] = (1, 8, 64, 256)
    pause_kib: tuple[int, ...] = (64, 256, 1024, 3500)
    """Sizes of the prompts whose tokenization must not block the event loop."""
    pods: tuple[int, ...] = (8, 64, 256)
    sessions: int = 8
    """Different prompts of each size."""
    engine_blocks: int = 100_000
    """Engine blocks in the cache whose events are ingested."""
    feed_rounds: int = 3
    """Rounds of benchmarks that take seconds: complete feeds, and many engines at once."""
    engines: int = 64
    """Engines followed at the same time."""
    proxy_rounds: int = 12
    requests: int = 300
    """Requests per round through each proxy; a third of that for large ones."""
    streams: int = 20
    """Streams per round through each proxy."""
    chunks: int = 100
    """Chunks per stream."""
    redis_keys: int = 1_000_000
    redis_lookups: int = 200
    """Lookups per round, of each kind."""
    redis_writes: int = 200_000
    """Blocks that an agent writes as fast as it can."""
    redis_lags: int = 200
    """Frames sent at a steady rate to measure the lag."""


QUICK = Scale(
    rounds=1,
    round_seconds=0.001,
    index_blocks=20_000,
    prompt_kib=(1, 64),
    pause_kib=(64,),
    pods=(8,),
    sessions=2,
    engine_blocks=3_000,
    feed_rounds=1,
    engines=4,
    proxy_rounds=1,
    requests=20,
    streams=2,
    chunks=10,
    redis_keys=2_000,
    redis_lookups=20,
    redis_writes=2_000,
    redis_lags=20,
)
"""Runs everything once, to check that it works. The figures are meaningless."""


def rounds_of(*calls: Callable[[], object], scale: Scale) -> list[list[float]]:
    """Mean seconds per call in each round, for each of `calls`. Their rounds alternate, so that noise affects all equally."""
    repeats = []
    for call in calls:
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(scale.round_seconds / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(scale.rounds):
        for call, repeat, out in zip(calls, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            out.append((time.perf_counter() - start) / repeat)
    return times


def ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of our time divided by the reference's."""
    return median(a / b for a, b in zip(ours, reference, strict=True))


def each(function: Callable[[T], object], items: Iterable[T]) -> Callable[[], None]:
    """A callable that calls `function` with every item."""
    kept = list(items)

    def call() -> None:
        for item in kept:
            function(item)

    return call


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a module-level function in a new process, so that its memory can be measured."""
    context: Any = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux)."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {key} in /proc/self/status, found none")


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process (Linux). It has nanoseconds, while /proc has ticks of 10 ms.

    The clock id is the one that `clock_getcpuclockid(3)` returns for the process.
    """
    return time.clock_gettime((~pid << 3) | 2)
