"""Exchanges load, prompts and ejections with other gateways over a channel that they share.

This is best effort: lost messages are not repeated, and without the channel the gateway only loses this information.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import structlog

from matrixinfer.errors import IndexUnavailable
from matrixinfer.pods.outliers import Outliers
from matrixinfer.scheduler.framework import Trust
from matrixinfer.tasks import cancel_and_wait
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.announcements import MOST_PAUSE_SECONDS, Announcements, pause_after
from matrixinfer.traffic.peers.channel import Channel
from matrixinfer.traffic.peers.loads import SILENT_SECONDS, PeerLoads
from matrixinfer.traffic.peers.message import Load, MalformedMessage, Sent, decode

DEADLINE_SECONDS = 2.0
"""Deadline for publishing one message."""
RETRY_SECONDS, RETRY_MAX_SECONDS = 0.25, 5.0
_SLICE_BLOCKS = 4096
"""Blocks to process before yielding to the event loop."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class PeerStats:
    """Message counters since the start."""

    sent: int = 0
    received: int = 0
    """Messages from other gateways."""
    malformed: int = 0
    dropped: int = 0
    """Messages that were ignored because there are too many gateways."""


class Peers:
    """Publishes this gateway's requests to its peers and records theirs.

    Use as an async context manager. It owns two tasks. It subscribes to `load` and `history` for this gateway's
    requests, and records those of its peers in `load`, `history` and `loads`; ejections go from and to `outliers`. `trust_of` returns the trust in an endpoint's events, or None if the endpoint is unknown here.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        loads: PeerLoads,
        load: LoadLedger,
        history: RoutingHistory,
        trust_of: Callable[[str], Trust | None],
        outliers: Outliers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = PeerStats()
        self.announcements = Announcements(loads.gateway)
        self.loads = loads
        self._channel = channel
        self._outliers = outliers
        self._load = load
        self._history = history
        self._trust_of = trust_of
        self._clock = clock
        self._wanted = asyncio.Event()
        self._lost = False
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self._channel.close)
            for name, work in (("publish", self._publish), ("listen", self._listen)):
                task = asyncio.create_task(self._supervised(work), name=f"peers-{name}")
                stack.push_async_callback(cancel_and_wait, task)
            stack.callback(self._load.subscribe(self._charged))
            stack.callback(self._history.subscribe(self.announcements.add_computed))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(IndexUnavailable, OSError):
            await self._stack.aclose()

    @property
    def dropped(self) -> int:
        """Prompts that were not published in full, plus messages that were ignored."""
        return self.announcements.dropped + self.stats.dropped

    def count(self) -> int:
        """How many other gateways have published lately."""
        return self.loads.count(self._clock())

    def _charged(self, *request: Any) -> None:
        """Publish the first request after a pause at once: an equal one may be on its way to a peer."""
        self.announcements.add_in_flight(*request)
        self._wanted.set()

    # The tasks

    async def _supervised(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` forever. Pauses grow while it fails soon after its start. `work` ends only by raising."""
        pause = RETRY_SECONDS
        while True:
            began = self._clock()
            try:
                await work()
            except (IndexUnavailable, OSError) as error:  # a `TimeoutError` is one
                if not self._lost:
                    log.warning("peers_lost", server=self._channel.where, error=str(error) or "no answer")
                self._lost = True
            except Exception:
                # Supervision boundary: routing does without peers.
                log.exception("peers_failed")
            await asyncio.sleep(pause)
            lasted = self._clock() > began + 2 * RETRY_MAX_SECONDS
            pause = RETRY_SECONDS if lasted else min(2 * pause, RETRY_MAX_SECONDS)

    async def _publish(self) -> None:
        await self._channel.ready()
        self.announcements.discard()
        while True:
            self._wanted.clear()
            load = {name: Load(*each) for name, each in self._load.loads().items()}
            ejected = () if self._outliers is None else self._outliers.ejected()
            message = self.announcements.message(load, self._clock(), ejected)
            if message is not None:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    await self._channel.publish(message)
                self.loads.publishes(load)
                self.stats.sent += 1
                await asyncio.sleep(pause_after(message, self.loads.count(self._clock())))
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(MOST_PAUSE_SECONDS):
                        await self._wanted.wait()

    async def _listen(self) -> None:
        await self._channel.ready()
        async with self._channel.listen() as receive:
            silent = 0
            while silent < 2:  # twice in a row, because this process may itself have been paused
                message = await receive(SILENT_SECONDS / 2)
                silent = silent + 1 if message is None else 0
                if message is not None:
                    await self._receive(message)
        raise IndexUnavailable("the channel is silent")  # not even this gateway's own messages come back

    async def _receive(self, data: bytes) -> None:
        try:
            message = decode(data)
        except MalformedMessage:
            self.stats.malformed += 1
            return
        if message.gateway == self.announcements.gateway:
            if self._lost:
                log.info("peers_restored", server=self._channel.where)
            self._lost = False
            return
        self.stats.received += 1
        if not self.loads.update(message.gateway, message.load, self._clock()):
            self.stats.dropped += 1
            return
        if self._outliers is not None:
            known = [name for name in message.ejected if self._trust_of(name) is not None]
            self._outliers.reported(message.gateway, known, seconds=SILENT_SECONDS)
        recorded = 0
        for sent in message.sent:
            recorded += self._record(sent)
            if recorded >= _SLICE_BLOCKS:
                recorded = 0
                await asyncio.sleep(0)

    def _record(self, sent: Sent) -> int:
        """Record a peer's prompt as if this gateway had sent it. Returns the number of its blocks."""
        trust = self._trust_of(sent.endpoint)
        if trust is None:
            return 0
        blocks = sent.blocks
        self._load.add_pending(sent.endpoint, sent.model, blocks)
        if sent.computed and (sent.by_bytes or trust != "exact"):
            self._history.record_reported(sent.endpoint, sent.model, blocks, by_bytes=sent.by_bytes)
        return len(blocks)
