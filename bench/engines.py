"""Following engines over sockets: blocks applied per second, and how long that blocks the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from bench.feed import record
from bench.measure import Figure, Scale
from bench.prompts import MODEL
from bench.publishers import in_process, publish_history, publish_live
from bench.turns import Turns
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import LogConfig
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import FeedState
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.telemetry import log

_TARGET_MS = 5.0
_IDLE_SECONDS = 0.5
_CACHE_BLOCKS = 4_000
_STEADY_FRAMES, _STEADY_RATE = 100, 50.0
_HISTORY_FRAMES = 9_000  # the engine keeps its last 10,000, as vLLM does
_TIMEOUT_SECONDS = 60.0


class _Case:
    """The measurements of one case, by round."""

    def __init__(self, target: float | None = None) -> None:
        self._target = target
        self._turns: list[Turns] = []
        self._rates: list[float] = []

    @contextmanager
    def watch(self, subscriber: Subscriber) -> Iterator[None]:
        """Measure one round."""
        turns = Turns()
        before, start = _applied(subscriber), time.perf_counter()
        with turns.watch():
            yield
        self._rates.append((_applied(subscriber) - before) / (time.perf_counter() - start))
        self._turns.append(turns)

    def figures(self, name: str) -> Iterator[Figure]:
        """The best values over the rounds."""
        if any(self._rates):
            yield Figure(case=name, name="rate", value=max(self._rates) / 1e6, unit="M blocks/s")
        on_cpu = min(turns.longest_on_cpu() for turns in self._turns)
        yield Figure(case=name, name="longest turn, on the CPU", value=on_cpu * 1e3, unit="ms", target=self._target)
        longest = min(turns.longest() for turns in self._turns)
        yield Figure(case=name, name="longest turn", value=longest * 1e3, unit="ms")
        yield Figure(case=name, name="p99", value=min(turns.p99() for turns in self._turns) * 1e3, unit="ms")


def run(scale: Scale) -> Iterator[Figure]:
    """An idle loop, engines at a steady rate and at full speed, and the replay of a long history."""
    log.configure(LogConfig(level="error"))
    feeds = [record(_CACHE_BLOCKS, pod=pod).payloads for pod in range(scale.engines)]
    history = record(scale.engine_blocks).payloads[:_HISTORY_FRAMES]
    cases: dict[str, _Case] = {}
    for _ in range(scale.feed_rounds):
        uvloop.run(_follow_live(feeds, cases))
        uvloop.run(_join_late(history, cases))
    for name, case in cases.items():
        yield from case.figures(name)


async def _follow_live(feeds: Sequence[Sequence[bytes]], cases: dict[str, _Case]) -> None:
    longest = max(map(len, feeds))
    with in_process(publish_live, feeds) as engines:
        async with Subscriber(index=MemoryIndex(), blocks=TokenBlockProcessor(128)) as subscriber:
            for pod, endpoint in enumerate(await _next_message(engines)):
                subscriber.follow(FeedSource(pod=f"pod-{pod}", model=MODEL, endpoint=endpoint))
            await _next_message(engines)  # all are connected
            with cases.setdefault("idle", _Case()).watch(subscriber):
                await asyncio.sleep(_IDLE_SECONDS)
            for name, end, rate in (("steady", _STEADY_FRAMES, _STEADY_RATE), ("full speed", longest, None)):
                frames = sum(len(feed[:end]) for feed in feeds)
                with cases.setdefault(f"{len(feeds)} engines, {name}", _Case(_TARGET_MS)).watch(subscriber):
                    engines.send((end, rate))
                    await _until(lambda: _frames(subscriber) == frames)  # noqa: B023 (awaited in this turn)
            _check(subscriber)


async def _join_late(history: Sequence[bytes], cases: dict[str, _Case]) -> None:
    with in_process(publish_history, history) as engine:
        async with Subscriber(index=MemoryIndex(), blocks=TokenBlockProcessor(128)) as subscriber:
            endpoint, replay_endpoint = await _next_message(engine)
            with cases.setdefault("late join", _Case(_TARGET_MS)).watch(subscriber):
                feed = subscriber.follow(
                    FeedSource(pod="pod", model=MODEL, endpoint=endpoint, replay_endpoint=replay_endpoint)
                )
                await _until(lambda: feed.state is FeedState.COMPLETE)
            _check(subscriber)


async def _next_message(engines: Connection) -> Any:
    """The next message from the process of the engines."""
    if not await asyncio.to_thread(engines.poll, _TIMEOUT_SECONDS):
        raise TimeoutError(f"expected a message from the engines within {_TIMEOUT_SECONDS:.0f} s, got none")
    return engines.recv()


async def _until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(_TIMEOUT_SECONDS):
        while not done():  # noqa: ASYNC110 (nothing signals this condition)
            await asyncio.sleep(0.005)


def _frames(subscriber: Subscriber) -> int:
    return sum(feed.stats.frames for feed in subscriber.feeds.values())


def _applied(subscriber: Subscriber) -> int:
    """Engine blocks stored and removed so far."""
    stats = [feed.ledger.stats for feed in subscriber.feeds.values()]
    return sum(each.stored + each.removed for each in stats)


def _check(subscriber: Subscriber) -> None:
    """Fail when the result is wrong: a figure for it would mean nothing."""
    for feed in subscriber.feeds.values():
        stats = feed.ledger.stats
        assert stats.stored
        assert stats.orphans + stats.unknown_removed + stats.misfits + feed.stats.malformed == 0, (stats, feed.stats)
