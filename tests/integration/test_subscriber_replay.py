"""The subscriber against real ZMQ sockets: what happened before, and what was missed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
import zmq

from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents import wire
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.replay import FRAME_BYTES
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.kvevents.subscription import Shared, Subscription
from matrixinfer.sim.events import AllBlocksCleared, EventBatch, encode
from matrixinfer.tasks import cancel_and_wait
from tests.waiting import DEADLINE_SECONDS, eventually

from .kvevents_support import BLOCKS, END, Answers, Engine, complete, held, stored


@pytest.fixture
def shared() -> Iterator[Shared]:
    context = zmq.Context()
    yield Shared(context)
    context.destroy(linger=0)


async def test_what_was_published_before_is_replayed_and_what_comes_after_follows(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 2))
        feed = subscriber.follow(engine.source())
        await eventually(lambda: complete(feed))
        assert held(index) == 2
        engine.publish(stored(2, 4))
        await eventually(lambda: held(index) == 4)


async def test_without_replay_a_late_start_is_partial_and_follows_what_comes(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine:
        engine.publish(stored(0, 1))
        feed = subscriber.follow(engine.source(replay=False))

        def is_heard() -> bool:
            engine.publish(stored(1, 2))
            return feed.stats.frames > 0

        await eventually(is_heard, pause=0.05)  # what is sent before the subscription has arrived is not replayed
        engine.publish(stored(0, 2))
        await eventually(lambda: held(index) == 2)
        assert feed.state is FeedState.PARTIAL
        assert feed.ledger.stats.orphans == feed.stats.frames - 1


async def test_the_loop_stays_responsive_while_a_long_history_is_replayed(
    subscriber: Subscriber, index: MemoryIndex
) -> None:
    async with Engine() as engine:
        for _ in range(3_000):
            engine.publish(AllBlocksCleared(), stored(0, 4))
        feed = subscriber.follow(engine.source())
        turns = 0
        async with asyncio.timeout(DEADLINE_SECONDS):
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
        await eventually(lambda: complete(feed))
        engine.publish(stored(0, 2))
        await eventually(lambda: feed.state is FeedState.PARTIAL)
        assert feed.stats.replays < 6
        assert held(index) == 2


async def test_a_bad_replay_endpoint_leaves_the_live_feed(subscriber: Subscriber, index: MemoryIndex) -> None:
    async with Engine() as engine:
        feed = subscriber.follow(replace(engine.source(), replay_endpoint="no such thing"))
        await eventually(lambda: feed.state is FeedState.PARTIAL)
        engine.publish(stored(0, 2))
        await eventually(lambda: held(index) == 2)


async def test_holes_and_a_missing_end_in_replays_are_fetched_again(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.replay.FRAME_TIMEOUT", 0.1)
    async with Engine() as engine:
        asked = engine.lose_in_replays([{1}, {2}, {3, END}])
        for n in range(4):
            engine.publish(stored(n, n + 1))
        feed = subscriber.follow(engine.source())
        await eventually(lambda: complete(feed))
        assert held(index) == 4
        assert asked == [0, 0, 1, 2, 3]  # the last one for the proof that nothing is left


async def test_a_replay_that_was_given_up_is_tried_again_later(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.replay.FRAME_TIMEOUT", 0.05)
    monkeypatch.setattr("matrixinfer.kvevents.subscription.RETRY_SECONDS", 0.1)
    async with Engine() as engine:
        asked = engine.lose_in_replays([{0, 1, END}] * 4)
        engine.publish(stored(0, 1))
        feed = subscriber.follow(engine.source())
        await eventually(lambda: feed.state is FeedState.PARTIAL)
        engine.publish(stored(1, 2))
        await eventually(lambda: complete(feed))
        assert held(index) == 2
        assert asked == [0, 0, 0, 0, 0, 1]  # the last one for what came since the one before, and brings nothing


async def test_malformed_replies_are_counted_and_bounded(
    subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.replay.MAX_MALFORMED", 5)
    async with Engine() as engine, Answers([[b"", b"short", b"x"]] * 100) as garbage:
        feed = subscriber.follow(replace(engine.source(), replay_endpoint=garbage.endpoint))
        await eventually(lambda: feed.state is FeedState.PARTIAL)
        assert feed.stats.malformed == 3 * 6


@pytest.mark.parametrize("before", [[b"", b"topic"], [b""], []], ids=["topic", "no topic", "bare"])
async def test_every_shape_of_a_replay_is_read(subscriber: Subscriber, index: MemoryIndex, before: list[bytes]) -> None:
    batches = [encode(EventBatch(0.0, [stored(n, n + 1)])) for n in range(3)]
    messages = [[*before, seq.to_bytes(8, "big"), payload] for seq, payload in enumerate(batches)]
    async with Engine() as engine, Answers([*messages, [*before, b"\xff" * 8, b""]]) as answers:
        feed = subscriber.follow(replace(engine.source(), replay_endpoint=answers.endpoint))
        await eventually(lambda: complete(feed))
        assert (held(index), feed.stats.malformed) == (3, 0)


async def test_a_history_of_more_bytes_than_a_reply_may_have_takes_several(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(encode(EventBatch(0.0, [stored(0, 1)]))) + FRAME_BYTES
    monkeypatch.setattr("matrixinfer.kvevents.replay.MAX_BYTES", 2 * size)
    async with Engine() as engine:
        asked = engine.lose_in_replays([])
        for n in range(4):
            engine.publish(stored(n, n + 1))
        feed = subscriber.follow(engine.source())
        await eventually(lambda: complete(feed))
        assert held(index) == 4
        assert asked == [0, 2, 3]


async def test_neither_replayed_nor_held_frames_hold_up_the_loop(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("drain", "subscription"):
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
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not complete(feed):
                before = applied
                await asyncio.sleep(0)
                most, waited = max(most, applied - before), max(waited, feed.backlog)
                if 50 < applied < 150:
                    engine.publish(AllBlocksCleared(), stored(0, 2))
        assert most == 1
        assert waited > 10
        assert held(index) == 2


async def test_a_reply_is_void_once_the_feed_has_moved_on(shared: Shared) -> None:
    async with Engine() as engine:
        asked = engine.lose_in_replays([])
        engine.publish(stored(0, 1))
        feed = PodFeed(Ledger(pod="a", model="m", blocks=BLOCKS, index=MemoryIndex()), can_replay=True)
        following = asyncio.create_task(Subscription(shared, engine.source(), feed).run())
        async with shared.applying:  # as when another feed is catching up
            await eventually(lambda: asked == [0])
            await asyncio.sleep(0.1)
            feed.disconnected()
            feed.reconnected()
        await eventually(lambda: complete(feed))
        await cancel_and_wait(following)
        assert (asked, feed.stats.frames) == ([0, 0, 0], 2)


async def test_each_gap_among_held_frames_is_given_up_after_as_many_attempts(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        if seconds:
            naps.append(seconds)

    ledger = Ledger(pod="a", model="m", blocks=BLOCKS, index=MemoryIndex())
    feed = PodFeed(ledger, can_replay=True)
    for number in (3, 5, 7):
        feed.live(number, encode(EventBatch(float(number), [stored(0, 1)])))
    subscription = Subscription(shared, FeedSource(pod="a", model="m", endpoint="tcp://a:1"), feed)
    with monkeypatch.context() as patch:
        patch.setattr("matrixinfer.kvevents.subscription.asyncio.sleep", nap)
        await subscription.replay()
    assert (feed.state, feed.backlog, feed.given_up) == (FeedState.PARTIAL, 0, True)
    assert naps == [0.4, 0.8] * 3


async def test_a_frame_lost_before_a_silence_is_found_by_the_heartbeat(
    subscriber: Subscriber, index: MemoryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.subscription.HEARTBEAT_SECONDS", 0.1)
    async with Engine() as engine:
        feed = subscriber.follow(engine.source())
        await eventually(lambda: complete(feed))
        engine.publish(stored(0, 1))
        await eventually(lambda: held(index) == 1)
        engine.publisher.lose(1)
        engine.publish(stored(1, 2))
        await eventually(lambda: held(index) == 2 and complete(feed))
        assert (feed.stats.silent_losses, feed.stats.gaps) == (1, 0)
        beats = feed.stats.heartbeats
        await eventually(lambda: feed.stats.heartbeats > beats + 1)
        assert feed.stats.silent_losses == 1


async def test_an_engine_whose_replay_endpoint_falls_silent_is_noticed(
    subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.subscription.HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr("matrixinfer.kvevents.replay.FRAME_TIMEOUT", 0.1)
    async with Engine() as engine:
        feed = subscriber.follow(engine.source())
        await eventually(lambda: feed.stats.heartbeats > 0)
        engine.lose_in_replays([{END}] * 100)
        await eventually(lambda: feed.is_silent)
        engine.publish(stored(0, 1))
        await eventually(lambda: not feed.is_silent)
