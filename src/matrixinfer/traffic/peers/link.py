"""Tells other gateways at the same Redis or Valkey, and listens to them.

Best effort: what is lost is not told again, and a server that is not there costs nothing but the sharing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import structlog

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis.store import Store
from matrixinfer.scheduler.framework import Trust
from matrixinfer.tasks import cancel_and_wait
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.announcements import Outgoing
from matrixinfer.traffic.peers.loads import SILENT_SECONDS, PeerLoads
from matrixinfer.traffic.peers.message import Load, MalformedMessage, Sent, decode

CHANNEL = "matrix:kv:gateways"
INTERVAL_SECONDS = 0.1
"""From one message to the next, at least."""
DEADLINE_SECONDS = 2.0
"""Of one publication."""
RETRY_SECONDS, RETRY_MAX_SECONDS = 0.25, 5.0
_SLICE_BLOCKS = 4096
"""Blocks taken in before others have a turn."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class PeerStats:
    """Messages since the start."""

    sent: int = 0
    received: int = 0
    """Of other gateways."""
    malformed: int = 0
    dropped: int = 0
    """Heard, but there were too many gateways."""


class Peers:
    """Use as an async context manager; it owns two tasks, and keeps one of the connections of `store` while it listens.

    What `load` and `history` learn from requests of this gateway is told; what others tell goes there, and into `loads`.
    `trust_of` says how far an endpoint's events are believed; None for endpoints that are not known here.
    """

    def __init__(
        self,
        store: Store,
        *,
        loads: PeerLoads,
        load: LoadLedger,
        history: RoutingHistory,
        trust_of: Callable[[str], Trust | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = PeerStats()
        self.outgoing = Outgoing(uuid.uuid4().hex)
        self.loads = loads
        self._store = store
        self._load = load
        self._history = history
        self._trust_of = trust_of
        self._clock = clock
        # Channels are the same in every database of a server, and the index is not.
        self._channel = CHANNEL if not store.config.db else f"{CHANNEL}:{store.config.db}"
        self._wanted = asyncio.Event()
        self._lost = False
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for name, work in (("publish", self._publish), ("listen", self._listen)):
                task = asyncio.create_task(self._supervised(work), name=f"peers-{name}")
                stack.push_async_callback(cancel_and_wait, task)
            self._load.on_charge, self._history.on_sent = self._charged, self.outgoing.holds
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._load.on_charge = self._history.on_sent = None
        with suppress(IndexUnavailable):
            await self._stack.aclose()

    @property
    def dropped(self) -> int:
        """Prompts that were not told whole, and messages that were not heeded."""
        return self.outgoing.dropped + self.stats.dropped

    def count(self) -> int:
        """Other gateways that are heard of now."""
        return self.loads.count(self._clock())

    def _charged(self, *request: Any) -> None:
        """After a quiet time the first request is told at once: the next equal one may be on its way to a peer."""
        self.outgoing.brings(*request)
        self._wanted.set()

    # The tasks

    async def _supervised(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it again and again, with longer pauses while it soon fails; it only returns by failing."""
        pause = RETRY_SECONDS
        while True:
            began = self._clock()
            try:
                await work()
            except (IndexUnavailable, TimeoutError) as error:
                if not self._lost:
                    log.warning("peers_lost", server=self._store.config.where, error=str(error) or "no answer")
                self._lost = True
            except Exception:
                # Supervision boundary: routing does without peers.
                log.exception("peers_failed")
            await asyncio.sleep(pause)
            lasted = self._clock() > began + 2 * RETRY_MAX_SECONDS
            pause = RETRY_SECONDS if lasted else min(2 * pause, RETRY_MAX_SECONDS)

    async def _publish(self) -> None:
        await self._store.ready()
        client: Any = self._store.client
        self.outgoing.lost()
        while True:
            self._wanted.clear()
            load = {name: Load(*each) for name, each in self._load.loads().items()}
            message = self.outgoing.message(load, self._clock())
            if message is not None:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    await self._store.ask(client.publish(self._channel, message))
                self.stats.sent += 1
                await asyncio.sleep(INTERVAL_SECONDS)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(INTERVAL_SECONDS):
                        await self._wanted.wait()

    async def _listen(self) -> None:
        await self._store.ready()
        client: Any = self._store.client
        channel = client.pubsub()
        try:
            await self._store.ask(channel.subscribe(self._channel))
            silent = 0
            while silent < 2:  # in a row, as this process may have stood still itself
                message = await self._store.ask(channel.get_message(timeout=SILENT_SECONDS / 2))
                silent = silent + 1 if message is None else 0
                if message is not None and message["type"] == "message":
                    await self._receive(message["data"])
            raise IndexUnavailable("nothing is heard")  # not even what is told here, which comes back
        finally:
            with suppress(IndexUnavailable):
                await self._store.ask(channel.aclose())

    async def _receive(self, data: bytes) -> None:
        try:
            message = decode(data)
        except MalformedMessage:
            self.stats.malformed += 1
            return
        if message.gateway == self.outgoing.gateway:
            if self._lost:
                log.info("peers_heard_again", server=self._store.config.where)
            self._lost = False
            return
        self.stats.received += 1
        if not self.loads.hear(message.gateway, message.load, self._clock()):
            self.stats.dropped += 1
            return
        taken = 0
        for sent in message.sent:
            taken += self._take(sent)
            if taken >= _SLICE_BLOCKS:
                taken = 0
                await asyncio.sleep(0)

    def _take(self, sent: Sent) -> int:
        """What a peer has sent counts as if it had been sent from here."""
        trust = self._trust_of(sent.endpoint)
        if trust is None:
            return 0
        blocks = sent.blocks
        self._load.add_pending(sent.endpoint, sent.model, blocks)
        if sent.computed and trust != "exact":
            self._history.heard(sent.endpoint, sent.model, blocks)
        return len(blocks)
