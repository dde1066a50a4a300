"""The subscriber against real ZMQ sockets: live frames, connections, many engines."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import msgspec
import pytest
import structlog
import zmq
import zmq.asyncio

from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents import wire
from matrixinfer.kvevents.feed import FeedState
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, encode
from tests.ports import two_ports
from tests.waiting import DEADLINE_SECONDS, eventually

from .kvevents_support import TOKENS, Engine, Relay, complete, held, ports_of, stored


async def test_an_engine_that_is_not_there_yet_is_followed_once_it_comes(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine(two_ports()) as engine:
        source = engine.source()
        ports = ports_of(source)
    feed = subscriber.follow(source)
    await asyncio.sleep(0.2)
    assert feed.state is FeedState.SYNCING
    async with Engine(ports) as engine:
        engine.publish(stored(0, 3))
        await eventually(lambda: held(index) == 3 and complete(feed))


async def test_a_restarted_engine_starts_from_nothing(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine(two_ports()) as engine:
        source = engine.source()
        ports = ports_of(source)
        feed = subscriber.follow(source)
        await eventually(lambda: complete(feed))
        engine.publish(stored(0, 4))
        await eventually(lambda: held(index) == 4)
    async with Engine(ports) as engine:
        engine.publish(stored(0, 1))
        await eventually(lambda: held(index) == 1)
        await eventually(lambda: complete(feed))


async def test_a_connection_that_is_silently_dead_is_replaced(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.connect.HEARTBEAT_MS", 50)
    monkeypatch.setattr("matrixinfer.kvevents.connect.HEARTBEAT_TIMEOUT_MS", 200)
    async with Engine() as engine, Relay(ports_of(engine.source())[0]) as relay:
        feed = subscriber.follow(replace(engine.source(), endpoint=relay.endpoint))
        await eventually(lambda: complete(feed))
        relay.go_silent()
        engine.publish(stored(0, 2))
        await eventually(lambda: held(index) == 2 and complete(feed))


async def test_a_message_that_is_too_long_costs_the_connection_but_not_the_feed(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.connect.MAX_MESSAGE_BYTES", 10_000)
    monkeypatch.setattr("matrixinfer.kvevents.subscription.HEARTBEAT_SECONDS", 0.1)
    async with Engine() as engine:
        feed = subscriber.follow(engine.source(replay=False))

        def hears(blocks: int) -> bool:
            engine.publish(stored(0, blocks))
            return held(index) == blocks

        await eventually(lambda: hears(1), pause=0.05)
        engine.publisher.publish(b"x" * 20_000)
        await eventually(lambda: feed.state is FeedState.STALE)
        await eventually(lambda: hears(2), pause=0.05)


async def test_every_topic_is_taken(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine(topic="kv-events") as engine:
        feed = subscriber.follow(engine.source())
        await eventually(lambda: complete(feed))
        engine.publish(stored(0, 4))
        await eventually(lambda: held(index) == 4)


async def test_a_configured_topic_that_does_not_match_is_counted(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine(topic="other") as engine:
        feed = subscriber.follow(engine.source(topic="kv-events"))
        await eventually(lambda: complete(feed))
        engine.publish(stored(0, 4))
        await eventually(lambda: feed.stats.wrong_topic == 1)
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
        async with asyncio.timeout(DEADLINE_SECONDS):
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
        await eventually(lambda: complete(feed))
        subscriber.unfollow("a")
        assert held(index) == 0
        assert not subscriber.feeds


async def test_a_clear_empties_the_pod(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 4))
        feed = subscriber.follow(engine.source())
        await eventually(lambda: complete(feed))
        engine.publish(AllBlocksCleared(), stored(0, 1))
        await eventually(lambda: held(index) == 1)


async def test_a_bad_endpoint_is_tried_again_and_hurts_no_other_feed(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.subscription.RESTART_MIN_SECONDS", 0.01)
    with structlog.testing.capture_logs() as logs:
        bad = subscriber.follow(FeedSource(pod="bad", model="m", endpoint="no such thing"))
        async with Engine() as engine:
            engine.publish(stored(0, 2))
            feed = subscriber.follow(engine.source())
            await eventually(lambda: complete(feed))
            await eventually(lambda: sum(line["event"] == "kv_events_failed" for line in logs) > 1)
    assert held(index) == 2
    assert bad.state is FeedState.STALE
    subscriber.unfollow("bad")


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
        await eventually(lambda: complete(feed))
        for _ in range(3):
            engine.publish(stored(0, 2))
        await eventually(lambda: feed.stats.frames == 3)
        assert (feed.stats.malformed, feed.state) == (1, FeedState.PARTIAL)
        assert held(index) == 2


async def test_a_feed_is_stale_while_its_connection_is_down(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine(two_ports()) as engine:
        source = engine.source()
        engine.publish(stored(0, 2))
        feed = subscriber.follow(source)
        await eventually(lambda: complete(feed))
    await eventually(lambda: feed.state is FeedState.STALE)
    assert held(index) == 2
    async with Engine(ports_of(source)) as engine:
        await eventually(lambda: complete(feed))  # it replays nothing, and the one before has kept its history
        assert held(index) == 0
        engine.publish(stored(0, 1))
        await eventually(lambda: held(index) == 1)
        assert complete(feed)


async def test_another_source_of_a_followed_pod_replaces_the_first(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as one, Engine() as other:
        one.publish(stored(0, 4))
        other.publish(stored(0, 1))
        feed = subscriber.follow(one.source())
        await eventually(lambda: complete(feed))
        assert subscriber.follow(one.source()) is feed
        later = subscriber.follow(other.source())
        assert held(index) == 0
        await eventually(lambda: complete(later))
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
        await eventually(lambda: complete(feed))
        relay.cut()
        await eventually(lambda: feed.state is FeedState.STALE)
        engine.publish(stored(1, 2))
        assert held(index) == 1
        await eventually(lambda: complete(feed))
        assert held(index) == 2
        assert (feed.ledger.stats.stored, feed.stats.restarts) == (2, 0)


async def test_ranks_of_one_pod_are_feeds_of_their_own(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as zero, Engine() as one:
        zero.publish(stored(0, 1))
        one.publish(stored(0, 3))
        feeds = [subscriber.follow(replace(e.source(), rank=rank)) for rank, e in enumerate((zero, one))]
        await eventually(lambda: all(map(complete, feeds)))
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
        await eventually(lambda: all(map(complete, feeds)))
        for engine in engines:
            engine.publish(stored(2, 4))
        await eventually(lambda: all(held(index, engine.pod) == 4 for engine in engines))


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
        peer, *_ = await asyncio.wait_for(router.recv_multipart(), DEADLINE_SECONDS)
        await router.send_multipart([peer, b"", b"\xff" * 8, b""])
        await eventually(lambda: complete(feed))
        await pub.send_multipart([b"", bytes(8), encode(EventBatch(0.0, [stored(0, 2)]))])
        await eventually(lambda: held(index) == 2)
    finally:
        context.destroy(linger=0)


async def test_an_engine_whose_events_cannot_be_trusted_is_named_with_the_reason(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    page = ["BlockStored", [hash(tuple(TOKENS[:16]))], None, TOKENS[:16], 16, None]
    async with Engine() as engine:
        engine.publish(stored(0, 2))
        with structlog.testing.capture_logs() as logs:
            feed = subscriber.follow(engine.source())
            await eventually(lambda: complete(feed))
            engine.publisher.publish(msgspec.msgpack.encode([0.0, [page], None]))
            await eventually(lambda: feed.state is FeedState.UNTRUSTED)
    assert held(index) == 0
    states = [
        (line["state"], line.get("reason"))
        for line in logs
        if line["event"] in {"kv_events_state_changed", "kv_events_degraded"}
    ]
    assert states[-1] == ("untrusted", feed.untrusted)


async def test_an_engine_of_tiny_blocks_is_warned_of_once(subscriber: Subscriber) -> None:
    tiny = msgspec.structs.replace(stored(0, 1), block_size=8, block_hashes=[1, 2], extra_keys=[None, None])
    with structlog.testing.capture_logs() as logs:
        async with Engine() as engine:
            feed = subscriber.follow(engine.source())
            await eventually(lambda: complete(feed))
            for _ in range(2):
                engine.publish(tiny)
            await eventually(lambda: feed.stats.frames == 2)
    lines = [line for line in logs if line["event"] in {"kv_events_small_blocks_found", "kv_events_layout_learned"}]
    assert [(line["event"], line["engine_block"]) for line in lines] == [
        ("kv_events_layout_learned", 8),
        ("kv_events_small_blocks_found", 8),
    ]
    assert lines[0]["hides"] == []


async def test_an_engine_that_cannot_be_reached_is_logged_once_and_stale(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.subscription.CONNECT_SECONDS", 0.1)
    async with Engine(two_ports()) as engine:
        source = engine.source()
    with structlog.testing.capture_logs() as logs:
        feed = subscriber.follow(source)
        await eventually(lambda: feed.state is FeedState.STALE)
        await asyncio.sleep(0.3)
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == [
        "kv_events_not_connected",
        "kv_events_degraded",
    ]
    async with Engine(ports_of(source)) as engine:
        engine.publish(stored(0, 2))
        await eventually(lambda: complete(feed))
        assert held(index) == 2


GIANT = 20_000


def giant() -> BlockStored:
    """Far more blocks at once than an engine computes; they begin with TOKENS."""
    return msgspec.structs.replace(
        stored(0, 4),
        block_hashes=list(range(1, GIANT + 1)),
        token_ids=list(range(GIANT * 16)),
        extra_keys=[None] * GIANT,
    )


@pytest.mark.parametrize("is_replayed", [False, True])
async def test_a_giant_frame_leaves_the_loop_room_and_the_next_one_waits_for_its_end(
    subscriber: Subscriber, index: MemoryIndex, is_replayed: bool
) -> None:
    events = giant(), BlockRemoved(block_hashes=[GIANT], medium="GPU", group_idx=0)
    async with Engine() as engine:
        if is_replayed:
            for event in events:
                engine.publish(event)
        feed = subscriber.follow(engine.source())
        if not is_replayed:
            await eventually(lambda: complete(feed))
            for event in events:
                engine.publish(event)
        seen = set[int]()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(feed.ledger) != GIANT - 1 or not complete(feed):
                seen.add(len(feed.ledger))
                await asyncio.sleep(0)
        assert len(seen) > 10
        assert held(index) == 4
        assert feed.ledger.stats.removed == 1


async def test_a_publisher_that_is_left_in_the_middle_of_a_giant_frame_leaves_nothing(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine:
        feed = subscriber.follow(engine.source())
        await eventually(lambda: complete(feed))
        engine.publish(giant())
        await eventually(lambda: 0 < len(feed.ledger) < GIANT, pause=0)
        assert 0 < held(index) <= 4
        subscriber.unfollow("a")
        for _ in range(20):
            await asyncio.sleep(0)
        assert (len(feed.ledger), held(index)) == (0, 0)
