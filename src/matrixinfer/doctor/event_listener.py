"""Listens to the publishers of one pod and applies their events as the gateway does, to learn what it would know."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import zmq

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import KvEventsConfig
from matrixinfer.doctor.facts import FeedFacts, ProbeFacts, Replay
from matrixinfer.feedtools.listen import CannotListen, Frame, Listener, Note, Stray
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.drain import Drain
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.replay import fetch
from matrixinfer.kvevents.subscription import FeedSource

SUBSCRIBED_SECONDS = 0.2
"""Time from the handshake until the engine's socket has processed the subscription; ZMQ does not report that."""
_UNREACHED = 2**62
"""A sequence number that no batch reaches: a replay from here on returns only the end marker."""
_MAX_TOPICS = 3


@dataclass(slots=True, kw_only=True)
class PublisherState:
    """One publisher, and what has arrived from it."""

    source: FeedSource
    feed: PodFeed
    error: str | None = None
    frames: int = 0
    first_frame: tuple[int, bytes] | None = None
    """Sequence number and payload of the first live frame."""
    other_topics: dict[str, None] = field(default_factory=dict)
    clock_ahead: float | None = None

    def apply(self, frame: Frame) -> None:
        """Apply a live frame."""
        topic = (frame.topic or b"").decode("utf-8", "replace")
        if self.source.topic is not None and topic != self.source.topic:
            if len(self.other_topics) < _MAX_TOPICS:
                self.other_topics[topic[:64]] = None
            return
        self.frames += 1
        self.first_frame = self.first_frame or (frame.seq, frame.payload)
        self.feed.live(frame.seq, frame.payload)
        if self.feed.stats.last_batch_at is not None:
            self.clock_ahead = self.feed.stats.last_batch_at - time.time()

    def facts(self, *, connected: bool, replay: Replay | None, probe: ProbeFacts | None) -> FeedFacts:
        """What is known about the publisher now."""
        source, ledger = self.source, self.feed.ledger
        return FeedFacts(
            name=source.name,
            source=KvEventsConfig(endpoint=source.endpoint, replay_endpoint=source.replay_endpoint, topic=source.topic),
            error=self.error,
            connected=connected,
            frames=self.frames,
            other_topics=tuple(self.other_topics),
            malformed=self.feed.stats.malformed,
            other_rank=self.feed.other_rank,
            untrusted=self.feed.untrusted,
            block_size=ledger.block_size,
            hides_salts=ledger.hides_salts,
            hides_adapters=ledger.hides_adapters,
            limits=ledger.limits,
            clock_ahead=self.clock_ahead,
            replay=replay,
            probe=probe,
        )


class EventListener:
    """Listens to every publisher of one pod. `publishers` has them by endpoint name. Use `listening` to run one."""

    def __init__(self, sources: Sequence[FeedSource], blocks: TokenBlockProcessor) -> None:
        self.index = MemoryIndex()
        self.publishers: Mapping[str, PublisherState] = {
            source.name: PublisherState(
                source=source,
                # Past events do not matter to a new prompt, so nothing is replayed.
                feed=PodFeed(
                    Ledger(pod=source.name, model=source.model, blocks=blocks, index=self.index), can_replay=False
                ),
            )
            for source in sources
        }
        for each in self.publishers.values():
            each.feed.listed_ranks = each.source.batch_ranks
        self._by_endpoint: dict[str, list[PublisherState]] = defaultdict(list)
        for each in self.publishers.values():
            self._by_endpoint[each.source.endpoint].append(each)
        self._news = asyncio.Event()
        self._sockets = Listener([KvEventsConfig(endpoint=endpoint) for endpoint in self._by_endpoint])

    @property
    def feeds(self) -> Mapping[str, PodFeed]:
        """The feed of each publisher."""
        return {name: each.feed for name, each in self.publishers.items()}

    async def __aenter__(self) -> Self:
        await self._sockets.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._sockets.__aexit__(kind, error, trace)

    def is_connected(self, name: str) -> bool:
        """Whether the connection to the publisher is up."""
        return self.publishers[name].source.endpoint in self._sockets.connected

    async def connect(self, seconds: float) -> None:
        """Wait until every publisher is connected, for at most `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while not all(self.is_connected(name) or each.error for name, each in self.publishers.items()):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass
        await asyncio.sleep(SUBSCRIBED_SECONDS)

    async def listen(self) -> None:
        """Apply what arrives, until cancelled."""
        while True:
            try:
                news = await self._sockets.next(60.0)
            except CannotListen as error:
                news = None
                self._note_error(str(error))
            self._news.set()
            if isinstance(news, Frame):
                for each in self._by_endpoint[news.publisher]:
                    each.apply(news)
            elif isinstance(news, Stray):
                for each in self._by_endpoint[news.publisher]:
                    each.feed.stats.malformed += 1
            elif isinstance(news, Note) and news.is_unresolved:
                self._note_error(f"{news.publisher}: {news.words}")

    def _note_error(self, message: str) -> None:
        for endpoint, publishers in self._by_endpoint.items():
            if message.startswith(f"{endpoint}: "):
                for publisher in publishers:
                    publisher.error = message.removeprefix(f"{endpoint}: ")


@asynccontextmanager
async def listening(
    sources: Sequence[FeedSource], blocks: TokenBlockProcessor, seconds: float
) -> AsyncIterator[EventListener]:
    """Listen within the context, which is entered when every publisher is connected, or after `seconds`."""
    async with EventListener(sources, blocks) as listener, asyncio.TaskGroup() as group:
        task = group.create_task(listener.listen())
        try:
            await listener.connect(seconds)
            yield listener
        finally:
            task.cancel()


async def check_replay(publisher: PublisherState, seconds: float) -> Replay | None:
    """Ask for a replay from the first live frame on. The replay must return that frame as it was published."""
    endpoint = publisher.source.replay_endpoint
    if endpoint is None:
        return None
    first = publisher.first_frame  # read once: a frame that arrives while the engine answers is not the one asked for
    start = _UNREACHED if first is None else first[0]
    context = zmq.Context()
    try:
        async with asyncio.timeout(seconds):
            reply = await fetch(context, Drain(), endpoint, start)
    except (TimeoutError, zmq.ZMQError):
        return "silent"
    finally:
        context.destroy(linger=0)
    if not reply.whole:
        return "silent"
    return "answers" if first is None or first in reply.frames[:1] else "foreign"
