"""The subscriber against real ZMQ sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import structlog
import zmq
import zmq.asyncio

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents import wire
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.sim.events import AllBlocksCleared, BlockStored, Event, EventBatch, encode
from matrixinfer.sim.publisher import EventPublisher

TOKENS = list(range(64))
BLOCKS = TokenBlockProcessor(16)
END = 2**64 - 1


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

    def __init__(self, ports: tuple[int, int] = (0, 0), topic: str = "", pod: str = "a") -> None:
        self.publisher = EventPublisher("127.0.0.1", port=ports[0], replay_port=ports[1], topic=topic)
        self.pod = pod

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
            pod=self.pod,
            model="m",
            endpoint=self.publisher.endpoint,
            replay_endpoint=self.publisher.replay_endpoint if replay else None,
            topic=topic,
        )

    def lose_in_replays(self, losses: list[set[int]]) -> list[int]:
        """Leave these numbers out of the next answers, one set each; returns the growing list of numbers asked for."""
        asked: list[int] = []
        router = self.publisher._router
        send = router.send_multipart

        async def lossy_send(parts: list[bytes]) -> None:
            if int.from_bytes(parts[-2], "big") not in (losses[len(asked) - 1] if len(asked) <= len(losses) else ()):
                await send(parts)

        async def replay(peer: bytes, start: int) -> None:
            asked.append(start)
            await EventPublisher._replay(self.publisher, peer, start)

        setattr(router, "send_multipart", lossy_send)  # noqa: B010 - mypy minds assigned methods
        setattr(self.publisher, "_replay", replay)  # noqa: B010
        return asked


class Answers:
    """Answers every request for a replay with the same messages."""

    def __init__(self, messages: list[list[bytes]]) -> None:
        self._messages = messages

    async def __aenter__(self) -> Answers:
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind("tcp://127.0.0.1:0")
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._task = asyncio.create_task(self._answer())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._context.destroy(linger=0)

    async def _answer(self) -> None:
        while True:
            peer, *_ = await self._router.recv_multipart()
            for message in self._messages:
                await self._router.send_multipart([peer, *message])


class Relay:
    """A TCP relay whose present connections can go silent without being closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.go_silent()
        for writer in self._writers:
            writer.close()

    def cut(self) -> None:
        """Close the present connections."""
        for writer in self._writers:
            writer.close()

    def go_silent(self) -> None:
        while self._tasks:
            self._tasks.pop().cancel()

    async def _join(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        far, to_far = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [to_near, to_far]
        self._tasks += [asyncio.create_task(self._pass(*pair)) for pair in ((near, to_far), (far, to_near))]

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)


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


def held(index: MemoryIndex, name: str = "a") -> int:
    return index.count("m", BLOCKS.chain(TOKENS)).get(name, 0)


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


async def test_a_connection_that_is_silently_dead_is_replaced(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.subscriber.HEARTBEAT_MS", 50)
    monkeypatch.setattr("matrixinfer.kvevents.subscriber.HEARTBEAT_TIMEOUT_MS", 200)
    async with Engine() as engine, Relay(ports_of(engine.source())[0]) as relay:
        feed = subscriber.follow(replace(engine.source(), endpoint=relay.endpoint))
        await until(lambda: complete(feed))
        relay.go_silent()
        engine.publish(stored(0, 2))
        await until(lambda: held(index) == 2)
        assert complete(feed)


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
        await until(lambda: feed.stats.wrong_topic == 1)
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
        subscriber.unfollow("a")
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


async def test_a_bad_endpoint_is_tried_again_and_hurts_no_other_feed(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.subscriber.RESTART_MIN_SECONDS", 0.01)
    with structlog.testing.capture_logs() as logs:
        bad = subscriber.follow(FeedSource(pod="bad", model="m", endpoint="no such thing"))
        async with Engine() as engine:
            engine.publish(stored(0, 2))
            feed = subscriber.follow(engine.source())
            await until(lambda: complete(feed))
            await until(lambda: sum(line["event"] == "kv_events_failed" for line in logs) > 1)
    assert held(index) == 2
    assert bad.state is FeedState.STALE
    subscriber.unfollow("bad")


async def test_a_bad_replay_endpoint_leaves_the_live_feed(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as engine:
        feed = subscriber.follow(replace(engine.source(), replay_endpoint="no such thing"))
        await until(lambda: feed.state is FeedState.PARTIAL)
        engine.publish(stored(0, 2))
        await until(lambda: held(index) == 2)


async def test_a_frame_that_cannot_be_applied_is_counted_and_the_next_ones_are_taken(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, calls = Ledger.apply, 0

    def fail_once(ledger: Ledger, event: wire.Event) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError
        apply(ledger, event)

    monkeypatch.setattr(Ledger, "apply", fail_once)
    async with Engine() as engine:
        feed = subscriber.follow(engine.source())
        await until(lambda: complete(feed))
        for _ in range(3):
            engine.publish(stored(0, 2))
        await until(lambda: feed.stats.frames == 3)
        assert (feed.stats.malformed, feed.state) == (1, FeedState.PARTIAL)
        assert held(index) == 2


async def test_holes_and_a_missing_end_in_replays_are_fetched_again(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.replay.FRAME_TIMEOUT", 0.1)
    async with Engine() as engine:
        asked = engine.lose_in_replays([{1}, {2}, {3, END}])
        for n in range(4):
            engine.publish(stored(n, n + 1))
        feed = subscriber.follow(engine.source())
        await until(lambda: complete(feed))
        assert held(index) == 4
        assert asked == [0, 0, 1, 2]


async def test_a_replay_that_was_given_up_is_tried_again_later(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.replay.FRAME_TIMEOUT", 0.05)
    monkeypatch.setattr("matrixinfer.kvevents.subscriber.RETRY_SECONDS", 0.1)
    async with Engine() as engine:
        asked = engine.lose_in_replays([{0, 1, END}] * 4)
        engine.publish(stored(0, 1))
        feed = subscriber.follow(engine.source())
        await until(lambda: feed.state is FeedState.PARTIAL)
        engine.publish(stored(1, 2))
        await until(lambda: complete(feed))
        assert held(index) == 2
        assert asked == [0] * 5


async def test_malformed_replies_are_counted_and_bounded(
    subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.replay.MAX_MALFORMED", 5)
    async with Engine() as engine, Answers([[b"", b"short", b"x"]] * 100) as garbage:
        feed = subscriber.follow(replace(engine.source(), replay_endpoint=garbage.endpoint))
        await until(lambda: feed.state is FeedState.PARTIAL)
        assert feed.stats.malformed == 3 * 6


async def test_a_feed_is_stale_while_its_connection_is_down(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as engine:
        source = engine.source()
        engine.publish(stored(0, 2))
        feed = subscriber.follow(source)
        await until(lambda: complete(feed))
    await until(lambda: feed.state is FeedState.STALE)
    assert held(index) == 2
    async with Engine(ports_of(source)) as engine:
        await until(lambda: complete(feed))
        assert held(index) == 0


async def test_another_source_of_a_followed_pod_replaces_the_first(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as one, Engine() as other:
        one.publish(stored(0, 4))
        other.publish(stored(0, 1))
        feed = subscriber.follow(one.source())
        await until(lambda: complete(feed))
        assert subscriber.follow(one.source()) is feed
        later = subscriber.follow(other.source())
        assert held(index) == 0
        await until(lambda: complete(later))
        one.publish(stored(0, 4))
        await asyncio.sleep(0.1)
        assert held(index) == 1
        assert subscriber.feeds == {"a": later}


async def test_unfollowing_what_is_not_followed_does_nothing(subscriber: Subscriber) -> None:
    subscriber.unfollow("a")


async def test_a_connection_that_breaks_costs_nothing_when_the_engine_is_the_same(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine, Relay(ports_of(engine.source())[0]) as relay:
        engine.publish(stored(0, 1))
        feed = subscriber.follow(replace(engine.source(), endpoint=relay.endpoint))
        await until(lambda: complete(feed))
        relay.cut()
        await until(lambda: feed.state is FeedState.STALE)
        engine.publish(stored(1, 2))
        assert held(index) == 1
        await until(lambda: complete(feed))
        assert held(index) == 2
        assert (feed.ledger.stats.stored, feed.stats.restarts) == (2, 0)


async def test_ranks_of_one_pod_are_feeds_of_their_own(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as zero, Engine() as one:
        zero.publish(stored(0, 1))
        one.publish(stored(0, 3))
        feeds = [subscriber.follow(replace(e.source(), rank=rank)) for rank, e in enumerate((zero, one))]
        await until(lambda: all(map(complete, feeds)))
        assert subscriber.feeds == {"a@dp0": feeds[0], "a@dp1": feeds[1]}
        assert (held(index, "a@dp0"), held(index, "a@dp1"), held(index)) == (1, 3, 0)
        subscriber.unfollow("a@dp1")
        assert (held(index, "a@dp0"), held(index, "a@dp1")) == (1, 0)


async def test_many_engines_are_followed_by_one_process(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Engine(pod=f"pod-{n}")) for n in range(24)]
        for engine in engines:
            engine.publish(stored(0, 2))
        feeds = [subscriber.follow(engine.source()) for engine in engines]
        await until(lambda: all(map(complete, feeds)))
        for engine in engines:
            engine.publish(stored(2, 4))
        await until(lambda: all(held(index, engine.pod) == 4 for engine in engines))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
async def test_engines_are_reached_by_name_and_by_address_of_either_kind(
    subscriber: Subscriber, index: MemoryIndex, host: str
) -> None:
    context = zmq.asyncio.Context()
    try:
        pub, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        for socket in (pub, router):
            socket.setsockopt(zmq.IPV6, int(host == "[::1]"))
            try:
                socket.bind("tcp://[::1]:0" if host == "[::1]" else "tcp://127.0.0.1:0")
            except zmq.ZMQError as error:
                pytest.skip(f"no IPv6 here: {error}")
        ports = [socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2] for socket in (pub, router)]
        live, replay = (f"tcp://{host}:{port}" for port in ports)
        feed = subscriber.follow(FeedSource(pod="a", model="m", endpoint=live, replay_endpoint=replay))
        peer, *_ = await asyncio.wait_for(router.recv_multipart(), 10)
        await router.send_multipart([peer, b"", b"\xff" * 8, b""])
        await until(lambda: complete(feed))
        await pub.send_multipart([b"", bytes(8), encode(EventBatch(0.0, [stored(0, 2)]))])
        await until(lambda: held(index) == 2)
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("before", [[b"", b"topic"], [b""], []], ids=["topic", "no topic", "bare"])
async def test_every_shape_of_a_replay_is_read(subscriber: Subscriber, index: MemoryIndex, before: list[bytes]) -> None:
    batches = [encode(EventBatch(0.0, [stored(n, n + 1)])) for n in range(3)]
    messages = [[*before, seq.to_bytes(8, "big"), payload] for seq, payload in enumerate(batches)]
    async with Engine() as engine, Answers([*messages, [*before, b"\xff" * 8, b""]]) as answers:
        feed = subscriber.follow(replace(engine.source(), replay_endpoint=answers.endpoint))
        await until(lambda: complete(feed))
        assert (held(index), feed.stats.malformed) == (3, 0)


async def test_a_history_of_more_bytes_than_a_reply_may_have_takes_several(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(encode(EventBatch(0.0, [stored(0, 1)])))
    monkeypatch.setattr("matrixinfer.kvevents.replay.MAX_BYTES", 2 * size)
    async with Engine() as engine:
        asked = engine.lose_in_replays([])
        for n in range(4):
            engine.publish(stored(n, n + 1))
        feed = subscriber.follow(engine.source())
        await until(lambda: complete(feed))
        assert held(index) == 4
        assert asked == [0, 2]


async def test_neither_replayed_nor_held_frames_hold_up_the_loop(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("drain", "subscriber"):
        monkeypatch.setattr(f"matrixinfer.kvevents.{module}.SLICE_SECONDS", 0.0)
    apply, applied = Ledger.apply, 0

    def count(ledger: Ledger, *events: wire.Event) -> None:
        nonlocal applied
        applied += 1
        apply(ledger, *events)

    monkeypatch.setattr(Ledger, "apply", count)
    most = waited = 0
    async with Engine() as engine:
        for _ in range(200):
            engine.publish(AllBlocksCleared(), stored(0, 4))
        feed = subscriber.follow(engine.source())
        async with asyncio.timeout(20):
            while not complete(feed):
                before = applied
                await asyncio.sleep(0)
                most, waited = max(most, applied - before), max(waited, feed.backlog)
                if 50 < applied < 150:
                    engine.publish(AllBlocksCleared(), stored(0, 2))
        assert most == 1
        assert waited > 10
        assert held(index) == 2
