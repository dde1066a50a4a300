"""The subscriber against an engine process that does its worst, over real sockets.

After each misdeed the index equals what the engine holds, or the feed's state says that it may not.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from tests.unit.kvevents.support import RecordingIndex
from tests.waiting import DEADLINE_SECONDS, eventually

SCRIPT = Path(__file__).with_name("hostile_engine.py")
BLOCK = 16
COMPLETE, PARTIAL, STALE = FeedState.COMPLETE, FeedState.PARTIAL, FeedState.STALE


class Engine:
    """The engine's process, at the same ports whenever it is started."""

    def __init__(self) -> None:
        self._ports = [0, 0]

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            SCRIPT,
            *map(str, self._ports),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._ports = await self.do("ports")

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()

    async def do(self, command: str, **arguments: object) -> Any:
        """Have it carry out a command; the result."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
        return json.loads(await asyncio.wait_for(self.process.stdout.readline(), DEADLINE_SECONDS))

    @property
    def source(self) -> FeedSource:
        live, replay = (f"tcp://127.0.0.1:{port}" for port in self._ports)
        return FeedSource(pod="a", model="m", endpoint=live, replay_endpoint=replay)


class World:
    """An engine, and a subscriber that follows it."""

    def __init__(self, engine: Engine, subscriber: Subscriber, index: RecordingIndex) -> None:
        self.engine = engine
        self.do = engine.do
        self._subscriber = subscriber
        self._index = index

    async def follow(self, source: FeedSource | None = None) -> PodFeed:
        """Follow the engine and catch up with it."""
        self.start(source)
        await self.exact()
        return self.feed

    def start(self, source: FeedSource | None = None) -> None:
        """Begin to follow the engine."""
        self.feed = self._subscriber.follow(source or self.engine.source)

    async def state(self, state: FeedState) -> None:
        """Wait for a state of the feed."""
        await eventually(lambda: self.feed.state is state)

    async def caught_up(self, state: FeedState) -> tuple[set[int], set[int]]:
        """Wait until the feed is in this state and has seen the engine's last batch; what is indexed, and what is true."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                truth = await self.do("truth")
                if self.feed.state is state and not self.feed.backlog and self.seen == truth["next"]:
                    return self._index.contents("a").get("m", set()), set(truth["blocks"])
                await asyncio.sleep(0.02)

    async def exact(self) -> None:
        """The feed gets complete, and the index equals the engine's blocks."""
        indexed, true = await self.caught_up(COMPLETE)
        assert indexed == true

    async def partial(self) -> None:
        """The feed gets partial, and the index has nothing that the engine has not."""
        indexed, true = await self.caught_up(PARTIAL)
        assert indexed <= true

    async def settled(self) -> None:
        """The feed has seen the last batch, and is exact or does not say that it is."""

        async def is_settled() -> bool:
            return self.feed.state in {COMPLETE, PARTIAL} and self.seen == (await self.do("truth"))["next"]

        await eventually(is_settled)
        await (self.exact() if self.feed.state is COMPLETE else self.partial())

    @property
    def seen(self) -> int:
        """Batches."""
        return self.feed.position or 0


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("matrixinfer.kvevents.replay.FRAME_TIMEOUT", 0.3)
    engine, index = Engine(), RecordingIndex()
    await engine.start()
    try:
        async with Subscriber(index=index, blocks=TokenBlockProcessor(BLOCK)) as subscriber:
            yield World(engine, subscriber, index)
    finally:
        await engine.kill()


@contextmanager
def relay(engine: Engine) -> Iterator[str]:
    """Between publisher and subscriber: whoever subscribes here does not see the engine's connection break."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    near, far = context.socket(zmq.XPUB), context.socket(zmq.XSUB)
    near.bind("tcp://127.0.0.1:0")
    far.setsockopt(zmq.RECONNECT_IVL, 10)
    far.connect(engine.source.endpoint)

    def pass_on() -> None:
        try:
            zmq.proxy(near, far)
        except zmq.ContextTerminated:
            near.close(linger=0)
            far.close(linger=0)

    thread = threading.Thread(target=pass_on)
    endpoint = near.getsockopt_string(zmq.LAST_ENDPOINT)
    thread.start()
    try:
        yield endpoint
    finally:
        context.term()
        thread.join()


async def test_an_engine_that_behaves_is_followed_exactly(world: World) -> None:
    await world.do("publish", batches=50)
    feed = await world.follow()
    await world.do("publish", batches=50)
    await world.exact()
    assert (feed.stats.gaps, feed.stats.restarts) == (0, 0)


async def test_live_frames_that_are_dropped_are_replayed(world: World) -> None:
    await world.do("publish", batches=20)
    feed = await world.follow()
    for _ in range(5):
        await world.do("publish", batches=7, lost=True)
        await world.do("publish", batches=7)
    await world.exact()
    assert (feed.stats.gaps >= 1, feed.stats.restarts) == (True, 0)


async def test_dropped_frames_that_are_no_longer_buffered_leave_a_partial_feed_until_the_next_clear(
    world: World,
) -> None:
    await world.do("restart", buffered=8)
    await world.do("publish", batches=5)
    feed = await world.follow()
    await world.do("publish", batches=20, lost=True)
    await world.do("publish", batches=20)
    await world.partial()
    assert feed.stats.truncated >= 1
    await world.do("publish", clear=True)
    await world.do("publish", batches=10)
    await world.exact()


async def test_an_engine_that_stalls_is_stale_and_then_followed_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.connect.HEARTBEAT_MS", 50)
    monkeypatch.setattr("matrixinfer.kvevents.connect.HEARTBEAT_TIMEOUT_MS", 200)
    await world.do("publish", batches=20)
    feed = await world.follow()
    world.engine.process.send_signal(signal.SIGSTOP)
    await world.state(STALE)
    world.engine.process.send_signal(signal.SIGCONT)
    await world.do("publish", batches=20)
    await world.exact()
    assert (feed.stats.restarts, feed.ledger.stats.clears) == (0, 0)


@pytest.mark.parametrize("batches", [5, 60], ids=["short of the old number", "past it"])
async def test_an_engine_that_restarts_is_followed_from_its_beginning(world: World, batches: int) -> None:
    await world.do("publish", batches=30)
    feed = await world.follow()
    await world.engine.kill()
    await world.state(STALE)
    await world.engine.start()
    await world.do("publish", batches=batches)
    await world.exact()
    assert feed.stats.restarts == 1


async def test_a_restart_past_the_old_number_is_noticed_even_behind_a_relay_that_hides_it(world: World) -> None:
    with relay(world.engine) as endpoint:
        await world.do("publish", batches=30)
        feed = await world.follow(replace(world.engine.source, endpoint=endpoint))
        await world.engine.kill()
        await world.engine.start()
        await world.do("publish", batches=60)  # most likely before the relay has come back

        async def is_noticed() -> bool:
            await world.do("publish")
            return feed.stats.restarts > 0

        await eventually(is_noticed, pause=0.02)
        await world.exact()
        assert feed.stats.restarts == 1


async def test_clears_in_the_middle_of_replays_are_applied_in_their_place(world: World) -> None:
    await world.do("publish", batches=200)
    await world.do("clear_within", replays=1)
    await world.follow()
    for _ in range(3):
        await world.do("clear_within", replays=1)
        await world.do("publish", batches=20, lost=True)
        await world.do("publish")
        await world.exact()


async def test_ten_thousand_large_frames_reach_a_slow_reader(world: World) -> None:
    await world.do("publish", batches=10_000, padding=4_500)
    slow = asyncio.create_task(burden())
    await world.follow()
    slow.cancel()


async def test_a_reader_that_stands_still_loses_nothing_of_a_replay(world: World) -> None:
    await world.do("publish", batches=4_000, padding=4_500)
    await world.do("pace", pause=0.01)
    world.start()
    for _ in range(12):
        time.sleep(0.1)  # noqa: ASYNC251
        await asyncio.sleep(0)
    await world.exact()
    assert (await world.do("truth"))["asked"] == [0, 3999]


async def burden() -> None:
    """Keep the loop busy for most of the time, as many requests do."""
    while True:
        time.sleep(0.004)  # noqa: ASYNC251
        await asyncio.sleep(0)


async def test_holes_in_replays_are_asked_for_until_they_are_filled(world: World) -> None:
    await world.do("publish", batches=40)
    await world.do("holes", answers=[[3, 4, 20], [20, 39], [30]])
    await world.follow()
    asked = (await world.do("truth"))["asked"]
    assert asked == [0, 2, 19, 29, 39]


async def test_a_replay_that_lost_its_end_and_only_that_is_asked_on(world: World) -> None:
    await world.do("publish", batches=400)
    await world.do("holes", answers=[list(range(300, 400))])
    await world.follow()
    assert (await world.do("truth"))["asked"] == [0, 299, 399]


async def test_replays_without_an_end_are_asked_on_until_they_have_one(world: World) -> None:
    await world.do("publish", batches=40)
    await world.do("endless", answers=2)
    await world.follow()
    asked = (await world.do("truth"))["asked"]
    assert asked == [0, 39, 39]


@pytest.mark.parametrize("lost", [False, True], ids=["live", "replayed"])
async def test_garbage_leaves_a_partial_feed_until_the_next_clear(world: World, lost: bool) -> None:
    await world.do("publish", batches=40)
    feed = await world.follow()
    await world.do("garbage", lost=lost)
    await world.do("publish", batches=40)
    await world.partial()
    assert feed.stats.malformed == 5
    await world.do("publish", clear=True)
    await world.do("publish", batches=10)
    await world.exact()


@pytest.mark.parametrize("seed", [1, 2])
async def test_after_everything_at_once_the_index_is_right_again(world: World, seed: int) -> None:
    choice = random.Random(seed)
    await world.do("publish", batches=40)
    await world.follow()
    for _ in range(60):
        match choice.randrange(9):
            case 0 | 1:
                await world.do("publish", batches=choice.randrange(20))
            case 2 | 3:
                await world.do("publish", batches=choice.randrange(20), lost=True)
            case 4:
                await world.do("holes", answers=[[world.seen + choice.randrange(10)]])
            case 5:
                await world.do("clear_within", replays=1)
            case 6:
                past = (await world.do("truth"))["next"] + 1
                await world.do("restart", buffered=choice.choice([10, 10_000]))
                await world.do("publish", batches=past, lost=True)
            case 7:
                await world.do("endless", answers=1)
            case 8:
                await world.do("garbage")
        await world.do("publish")
        await asyncio.sleep(choice.choice([0.0, 0.1]))
    await world.settled()
    await world.do("publish", batches=3, clear=True)
    await world.exact()
