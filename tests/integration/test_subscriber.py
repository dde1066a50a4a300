"""The subscriber against real ZMQ sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import zmq

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.sim.events import AllBlocksCleared, BlockStored, Event, EventBatch, encode
from matrixinfer.sim.publisher import EventPublisher

TOKENS = list(range(64))
BLOCKS = TokenBlockProcessor(16)


def stored(first: int, last: int) -> BlockStored:
    """Blocks [first, last) of TOKENS, 16 tokens each, named by their position."""
    return BlockStored(
        block_hashes=[100 + i for i in range(first, last)],
        parent_block_hash=99 + first if first else None,
        token_ids=TOKENS[first * 16 : last * 16],
        block_size=16,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[None] * (last - first),
        group_idx=0,
        kv_cache_spec_kind="full_attention",
    )


class Engine:
    """A publisher with its replay task."""

    def __init__(self, ports: tuple[int, int] = (0, 0), topic: str = "") -> None:
        self.publisher = EventPublisher("127.0.0.1", port=ports[0], replay_port=ports[1], topic=topic)

    async def __aenter__(self) -> Engine:
        await self.publisher.__aenter__()
        self._task = asyncio.create_task(self.publisher.serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self.publisher.__aexit__(None, None, None)

    def publish(self, *events: Event) -> None:
        self.publisher.publish(encode(EventBatch(0.0, list(events))))

    def source(self, *, replay: bool = True, topic: str | None = None) -> FeedSource:
        return FeedSource(
            pod="a",
            model="m",
            endpoint=self.publisher.endpoint,
            replay_endpoint=self.publisher.replay_endpoint if replay else None,
            topic=topic,
        )


def ports_of(source: FeedSource) -> tuple[int, int]:
    assert source.replay_endpoint is not None
    return int(source.endpoint.rpartition(":")[2]), int(source.replay_endpoint.rpartition(":")[2])


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def index() -> MemoryIndex:
    return MemoryIndex()


@pytest.fixture
async def subscriber(index: MemoryIndex) -> AsyncIterator[Subscriber]:
    async with Subscriber(index=index, blocks=BLOCKS) as subscriber:
        yield subscriber


def held(index: MemoryIndex) -> int:
    return index.count("m", BLOCKS.chain(TOKENS)).get("a", 0)


def complete(feed: PodFeed) -> bool:
    return feed.state is FeedState.COMPLETE


async def test_what_was_published_before_is_replayed_and_what_comes_after_follows(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 2))
        feed = subscriber.follow(engine.source())
        await until(lambda: complete(feed))
        assert held(index) == 2
        engine.publish(stored(2, 4))
        await until(lambda: held(index) == 4)


async def test_without_replay_a_late_start_is_partial_and_follows_what_comes(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 1))
        feed = subscriber.follow(engine.source(replay=False))
        await asyncio.sleep(0.3)  # the subscription must have reached the publisher: nothing is replayed
        engine.publish(stored(1, 2))
        engine.publish(stored(0, 2))
        await until(lambda: held(index) == 2)
        assert feed.state is FeedState.PARTIAL
        assert feed.ledger.stats.orphans == 1


async def test_an_engine_that_is_not_there_yet_is_followed_once_it_comes(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine:
        source = engine.source()
        ports = ports_of(source)
    feed = subscriber.follow(source)
    await asyncio.sleep(0.2)
    assert feed.state is FeedState.SYNCING
    async with Engine(ports) as engine:
        engine.publish(stored(0, 3))
        await until(lambda: held(index) == 3)
        assert complete(feed)


async def test_a_restarted_engine_starts_from_nothing(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as engine:
        source = engine.source()
        ports = ports_of(source)
        feed = subscriber.follow(source)
        await until(lambda: complete(feed))
        engine.publish(stored(0, 4))
        await until(lambda: held(index) == 4)
    async with Engine(ports) as engine:
        engine.publish(stored(0, 1))
        await until(lambda: held(index) == 1)
        await until(lambda: complete(feed))


async def test_every_topic_is_taken(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine(topic="kv-events") as engine:
        feed = subscriber.follow(engine.source())
        await until(lambda: complete(feed))
        engine.publish(stored(0, 4))
        await until(lambda: held(index) == 4)


async def test_a_configured_topic_that_does_not_match_is_counted(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine(topic="other") as engine:
        feed = subscriber.follow(engine.source(topic="kv-events"))
        await until(lambda: complete(feed))
        engine.publish(stored(0, 4))
        await until(lambda: subscriber.wrong_topics("a") == 1)
        assert held(index) == 0


async def test_garbage_is_counted_and_survived(subscriber: Subscriber, index: MemoryIndex) -> None:
    context = zmq.Context()
    try:
        socket = context.socket(zmq.PUB)
        socket.bind("tcp://127.0.0.1:0")
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        feed = subscriber.follow(FeedSource(pod="a", model="m", endpoint=endpoint))
        frames = [
            [b""],
            [b"", b"short", b"x"],
            [b"", bytes(8), b"\xc1 no msgpack"],
            [b"", bytes(7) + b"\x01", encode(EventBatch(0.0, [stored(0, 4)]))],
        ]
        async with asyncio.timeout(10):
            while held(index) < 4:  # a PUB socket drops what it sends before the subscription has come
                for frame in frames:
                    socket.send_multipart(frame)
                await asyncio.sleep(0.05)
        assert feed.stats.malformed >= 3
        assert feed.state is FeedState.PARTIAL
    finally:
        context.destroy(linger=0)


async def test_unfollowing_forgets_the_pod(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 4))
        feed = subscriber.follow(engine.source())
        await until(lambda: complete(feed))
        await subscriber.unfollow("a")
        assert held(index) == 0
        assert not subscriber.feeds


async def test_a_clear_empties_the_pod(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 4))
        feed = subscriber.follow(engine.source())
        await until(lambda: complete(feed))
        engine.publish(AllBlocksCleared(), stored(0, 1))
        await until(lambda: held(index) == 1)


async def test_the_loop_stays_responsive_while_a_long_history_is_replayed(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine:
        for _ in range(3_000):
            engine.publish(AllBlocksCleared(), stored(0, 4))
        feed = subscriber.follow(engine.source())
        turns = 0
        async with asyncio.timeout(20):
            while not complete(feed):
                await asyncio.sleep(0)
                turns += 1
        assert held(index) == 4
        assert turns > 10


async def test_a_replay_that_never_has_what_is_missing_is_given_up(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as engine, Engine() as other:
        engine.publish(stored(0, 1))
        source = replace(engine.source(), replay_endpoint=other.publisher.replay_endpoint)
        feed = subscriber.follow(source)
        await until(lambda: complete(feed))
        engine.publish(stored(0, 2))
        await until(lambda: feed.state is FeedState.PARTIAL)
        assert feed.stats.replays < 6
        assert held(index) == 2
