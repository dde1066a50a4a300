"""Listens to the publishers of one pod and applies what comes as the gateway does, to see what it would know."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

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
"""From the handshake until the engine's socket has taken in the subscription, which nothing tells."""
_FUTURE = 2**62
"""A number that no batch has reached: asked for, the end marker alone comes back."""
_MAX_TOPICS = 3


@dataclass(slots=True, kw_only=True)
class Heard:
    """One publisher, and what has come from it."""

    source: FeedSource
    feed: PodFeed
    error: str | None = None
    frames: int = 0
    first: tuple[int, bytes] | None = None
    """Number and payload of the first live frame."""
    other_topics: dict[str, None] = field(default_factory=dict)
    clock_ahead: float | None = None

    def take(self, frame: Frame) -> None:
        """A live frame."""
        topic = (frame.topic or b"").decode("utf-8", "replace")
        if self.source.topic is not None and topic != self.source.topic:
            if len(self.other_topics) < _MAX_TOPICS:
                self.other_topics[topic[:64]] = None
            return
        self.frames += 1
        self.first = self.first or (frame.seq, frame.payload)
        self.feed.live(frame.seq, frame.payload)
        if self.feed.stats.last_batch_at is not None:
            self.clock_ahead = self.feed.stats.last_batch_at - time.time()

    def facts(self, *, connected: bool, replay: Replay | None, probe: ProbeFacts | None) -> FeedFacts:
        """What is known in the end."""
        source, ledger = self.source, self.feed.ledger
        return FeedFacts(
            name=source.name,
            source=KvEventsConfig(endpoint=source.endpoint, replay_endpoint=source.replay_endpoint, topic=source.topic),
            error=self.error,
            connected=connected,
            frames=self.frames,
            other_topics=tuple(self.other_topics),
            malformed=self.feed.stats.malformed,
            untrusted=self.feed.untrusted,
            block_size=ledger.block_size,
            hides_salts=ledger.hides_salts,
            hides_adapters=ledger.hides_adapters,
            clock_ahead=self.clock_ahead,
            replay=replay,
            probe=probe,
        )


class Ear:
    """Every publisher of one pod, by what it is called in the index. Made by `listening`."""

    def __init__(self, sources: Sequence[FeedSource], blocks: TokenBlockProcessor) -> None:
        self.index = MemoryIndex()
        self.heard: Mapping[str, Heard] = {
            source.name: Heard(
                source=source,
                # What was published before does not matter to a new prompt, so nothing is replayed.
                feed=PodFeed(
                    Ledger(pod=source.name, model=source.model, blocks=blocks, index=self.index), can_replay=False
                ),
            )
            for source in sources
        }
        self._by_endpoint: dict[str, list[Heard]] = defaultdict(list)
        for each in self.heard.values():
            self._by_endpoint[each.source.endpoint].append(each)
        self._news = asyncio.Event()
        self.listener = Listener([KvEventsConfig(endpoint=endpoint) for endpoint in self._by_endpoint])

    @property
    def feeds(self) -> Mapping[str, PodFeed]:
        """The feed of each publisher."""
        return {name: each.feed for name, each in self.heard.items()}

    def is_connected(self, name: str) -> bool:
        """Whether a connection to the publisher is up."""
        return self.heard[name].source.endpoint in self.listener.connected

    async def connect(self, seconds: float) -> None:
        """Wait until every publisher is connected, at most so long."""
        try:
            async with asyncio.timeout(seconds):
                while not all(self.is_connected(name) or each.error for name, each in self.heard.items()):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass
        await asyncio.sleep(SUBSCRIBED_SECONDS)

    async def listen(self) -> None:
        """Take what comes until cancelled."""
        while True:
            try:
                news = await self.listener.next(60.0)
            except CannotListen as error:
                news = None
                self._cannot(str(error))
            self._news.set()
            if isinstance(news, Frame):
                for each in self._by_endpoint[news.publisher]:
                    each.take(news)
            elif isinstance(news, Stray):
                for each in self._by_endpoint[news.publisher]:
                    each.feed.stats.malformed += 1
            elif isinstance(news, Note) and "resolve" in news.words:
                self._cannot(f"{news.publisher}: {news.words}")

    def _cannot(self, message: str) -> None:
        for endpoint, each in self._by_endpoint.items():
            if message.startswith(f"{endpoint}: "):
                for heard in each:
                    heard.error = message.removeprefix(f"{endpoint}: ")


@asynccontextmanager
async def listening(sources: Sequence[FeedSource], blocks: TokenBlockProcessor, seconds: float) -> AsyncIterator[Ear]:
    """Listen within the context, which begins when every publisher is connected, or after `seconds`."""
    ear = Ear(sources, blocks)
    async with ear.listener, asyncio.TaskGroup() as group:
        task = group.create_task(ear.listen())
        try:
            await ear.connect(seconds)
            yield ear
        finally:
            task.cancel()


async def replays(heard: Heard, seconds: float) -> Replay | None:
    """What the replay endpoint answers: from the first frame heard on, which must come back as it was published."""
    endpoint = heard.source.replay_endpoint
    if endpoint is None:
        return None
    first = heard.first  # one that comes while the endpoint is asked was not asked for
    start = _FUTURE if first is None else first[0]
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
