"""Follows the load that SGLang publishes over ZMQ, so that nobody has to wait for the next reading of its metrics.

A report replaces the one before, so that lost ones do not matter. Silence makes them outdated, and `/metrics` counts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeAlias

import structlog
import zmq

from matrixinfer.errors import shortage_in
from matrixinfer.kvevents.connect import Unresolved, connect, open_context, subscribe
from matrixinfer.kvevents.drain import Drain
from matrixinfer.pods.load_reports import parse_load
from matrixinfer.pods.registry import Pod, PodRegistry

_MAX_SOCKETS = 4_096
FRAMES_QUEUED = 8
"""Reports per publisher that ZMQ queues."""
RETRY_SECONDS = 10.0
SILENT_SECONDS = 30.0
"""After so long without a message a new connection is made. ZMQ makes none by itself after a message that is too long."""

Outcome: TypeAlias = Literal["taken", "malformed", "misdirected"]
"""What became of a report; `misdirected` if it names another rank than the publisher is listed as."""

log = structlog.get_logger(__name__)


class LoadFollower:
    """Keeps the registry up to date with published load. Use it as an async context manager; call `follow` within it."""

    def __init__(
        self, registry: PodRegistry, on_shortage: Callable[[str, str], None] = lambda _place, _what: None
    ) -> None:
        self._registry = registry
        self._on_shortage = on_shortage
        self._followed: dict[str, dict[str, tuple[_Publisher, asyncio.Task[None]]]] = {}  # pod -> endpoint -> …
        self.stats: dict[str, Counter[Outcome]] = {}
        """By endpoint: what became of its reports; for reading."""
        self._group = asyncio.TaskGroup()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._drain = Drain()

    async def __aenter__(self) -> Self:
        self._context = open_context(_MAX_SOCKETS)
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._followed):
            self.leave(name)
        # The group must not see the caller's error: it would wrap it in an exception group.
        await self._group.__aexit__(None, None, None)
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def follow(self, pod: Pod) -> None:
        """Follow the pod where it publishes its load now."""
        wanted = _publishers(pod)
        followed = self._followed.setdefault(pod.name, {})
        for name in [name for name, (publisher, _) in followed.items() if wanted.get(name) != publisher]:
            self._stop(followed, name)
        for name, publisher in wanted.items():
            if name not in followed:
                self.stats[name] = Counter()
                task = self._group.create_task(self._run(publisher), name=f"load {name}")
                followed[name] = publisher, task

    def leave(self, name: str) -> None:
        """Stop following a pod. Does nothing if it is not followed."""
        followed = self._followed.pop(name, {})
        for endpoint in list(followed):
            self._stop(followed, endpoint)

    def _stop(self, followed: dict[str, tuple[_Publisher, asyncio.Task[None]]], name: str) -> None:
        followed.pop(name)[1].cancel()
        self.stats.pop(name, None)

    async def _run(self, publisher: _Publisher) -> None:
        """Follow one publisher until cancelled."""
        while True:
            try:
                await self._listen(publisher)
                continue
            except Exception as error:
                # Supervision boundary: an error over one publisher must not end the others.
                shortage = shortage_in(error)
                if shortage is not None:
                    self._on_shortage("loads", f"cannot connect to {publisher.address}: {shortage}")
                elif isinstance(error, Unresolved):
                    log.warning(
                        "kv_events_unresolved", pod=publisher.name, endpoint=publisher.address, error=error.strerror
                    )
                else:
                    log.exception("load_feed_failed", pod=publisher.name, endpoint=publisher.address)
            await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self, publisher: _Publisher) -> None:
        """Follow it until it has been silent for too long."""
        if self._context is None:
            raise RuntimeError("the follower is not running")
        news = asyncio.Event()

        def take(parts: list[bytes]) -> None:
            news.set()
            self._take(publisher, parts)

        with ExitStack() as stack:
            socket = subscribe(self._context, queued=FRAMES_QUEUED)
            stack.callback(socket.close, linger=0)
            await connect(socket, publisher.address)
            stack.enter_context(self._drain.reading(socket, take))
            with suppress(TimeoutError):
                while True:
                    news.clear()
                    async with asyncio.timeout(SILENT_SECONDS):
                        await news.wait()

    def _take(self, publisher: _Publisher, parts: list[bytes]) -> None:
        """Take a message `[topic, number, report]`."""
        stats = self.stats.get(publisher.name)
        if stats is None:  # it is not followed any more
            return
        report = parse_load(parts[2], read_at=self._registry.clock()) if len(parts) == 3 else None
        outcome: Outcome = "taken"
        if report is None:
            outcome = "malformed"
        elif report.rank is not None and publisher.rank is not None and report.rank != publisher.rank:
            outcome = "misdirected"
        else:
            self._registry.published_load(publisher.pod, publisher.name, report)
        stats[outcome] += 1
        if stats[outcome] == 1:
            if outcome == "taken":
                log.info("load_feed_followed", pod=publisher.name)
            else:
                log.warning("load_feed_ignored", pod=publisher.name, reason=outcome)


class _Publisher(NamedTuple):
    pod: str
    name: str
    """The endpoint."""
    address: str
    rank: int | None
    """The rank as which it is listed."""


def _publishers(pod: Pod) -> Mapping[str, _Publisher]:
    """Where each endpoint of a pod publishes its load. One rank of several does not speak for the pod."""
    sources = pod.kv_sources or ()
    if len(sources) == 1 < pod.rank_count:
        return {}
    names = {endpoint.rank: endpoint.name for endpoint in pod.endpoints}
    return {
        name: _Publisher(pod.name, name, source.load_endpoint, source.rank)
        for source in sources
        if source.load_endpoint is not None
        for name in (names.get(source.rank if len(sources) > 1 else None),)
        if name is not None
    }
