"""The order in which a listener hands frames on; its sockets are tested with the commands that use it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from matrixinfer.config import KvEventsConfig
from matrixinfer.feedtools import listen
from matrixinfer.feedtools.listen import CannotListen, Frame, FrameSequence, Listener, News
from matrixinfer.kvevents.replay import Reply

SOURCE = KvEventsConfig(endpoint="tcp://engine:1", replay_endpoint="tcp://engine:2")


def payload(seq: int, engine: str = "a") -> bytes:
    return f"{engine}{seq}".encode()


class Replays:
    """An engine's replays, and a publisher that asks for them."""

    def __init__(self, *, replay: bool = True) -> None:
        self.has: dict[int, bytes] = {}
        self.lost: list[set[int]] = []
        """Numbers that the next replies lose; -1 stands for the end marker."""
        self.asked: list[int] = []
        self.news: list[News] = []
        source = SOURCE if replay else KvEventsConfig(endpoint=SOURCE.endpoint)
        self.sequence = FrameSequence(source, self._put, self._fetch)

    async def _put(self, news: News) -> None:
        self.news.append(news)

    async def _fetch(self, endpoint: str, start: int) -> Reply:
        assert endpoint == SOURCE.replay_endpoint
        self.asked.append(start)
        lost = self.lost.pop(0) if self.lost else set()
        frames = [(seq, data) for seq, data in sorted(self.has.items()) if seq >= start and seq not in lost]
        return Reply(frames=frames, whole=-1 not in lost)

    def publish(self, *numbers: int, engine: str = "a") -> None:
        """Published, so that a replay has them, but not seen live."""
        self.has |= {seq: payload(seq, engine) for seq in numbers}

    async def live(self, *numbers: int, engine: str = "a") -> None:
        for seq in numbers:
            self.publish(seq, engine=engine)
            await self.sequence.live(seq, b"kv", payload(seq, engine))

    async def history(self) -> None:
        await self.sequence.history()

    @property
    def seen(self) -> list[str]:
        return [news.payload.decode() for news in self.news if isinstance(news, Frame)]

    @property
    def notes(self) -> int:
        return sum(not isinstance(news, Frame) for news in self.news)


async def test_history_comes_first_and_once() -> None:
    engine = Replays()
    engine.publish(0, 1, 2)
    await engine.history()
    await engine.live(1, 2, 3)
    assert engine.seen == ["a0", "a1", "a2", "a3"]
    assert engine.asked == [0]
    assert [news.topic for news in engine.news if isinstance(news, Frame)] == [None, None, None, b"kv"]


async def test_a_gap_is_filled_before_the_frame_that_showed_it() -> None:
    engine = Replays()
    await engine.live(0)
    engine.publish(1, 2)
    await engine.live(3, 4)
    assert engine.seen == ["a0", "a1", "a2", "a3", "a4"]
    assert engine.asked == [0]


async def test_a_hole_in_a_reply_is_asked_for_again() -> None:
    engine = Replays()
    engine.publish(0, 1, 2, 3)
    engine.lost = [{2}, {3, -1}]
    await engine.history()
    assert engine.seen == ["a0", "a1", "a2", "a3"]
    assert engine.asked == [0, 2, 3]


async def test_batches_that_the_engine_no_longer_has_are_skipped() -> None:
    engine = Replays()
    engine.publish(3, 4, 7)
    await engine.history()
    assert engine.seen == ["a3", "a4", "a7"]
    assert engine.notes == 0


async def test_a_replay_that_does_not_come_is_noted_and_live_frames_go_on() -> None:
    engine = Replays()
    engine.lost = [{-1}] * 5
    await engine.history()
    await engine.live(5, 7)
    assert engine.seen == ["a5", "a7"]
    assert engine.notes >= 1


async def test_a_smaller_number_is_a_new_engine_whose_history_comes_first() -> None:
    engine = Replays()
    await engine.live(0, 1, 2)
    engine.has.clear()
    engine.publish(0, engine="b")
    await engine.live(1, engine="b")
    assert engine.seen == ["a0", "a1", "a2", "b0", "b1"]


async def test_an_engine_that_restarted_and_overtook_is_recognised_by_its_bytes() -> None:
    engine = Replays()
    await engine.live(0, 1)
    engine.has.clear()
    engine.publish(0, 1, 2, 3, engine="b")
    await engine.live(4, engine="b")
    assert engine.seen == ["a0", "a1", "b0", "b1", "b2", "b3", "b4"]


async def test_after_a_lost_connection_even_the_next_number_must_prove_its_engine() -> None:
    engine = Replays()
    await engine.live(0, 1)
    engine.has.clear()
    engine.publish(0, 1, engine="b")
    engine.sequence.in_doubt = True
    await engine.live(2, 3, engine="b")
    assert engine.seen == ["a0", "a1", "b0", "b1", "b2", "b3"]


async def test_the_same_engine_after_a_lost_connection_goes_on() -> None:
    engine = Replays()
    await engine.live(0, 1)
    engine.sequence.in_doubt = True
    await engine.live(2, 3)
    assert engine.seen == ["a0", "a1", "a2", "a3"]


async def test_the_last_frame_repeated_is_passed_on_once() -> None:
    engine = Replays()
    await engine.live(0, 1, 1)
    assert engine.seen == ["a0", "a1"]
    assert engine.asked == []


async def test_without_a_replay_frames_pass_as_they_come() -> None:
    engine = Replays(replay=False)
    await engine.live(4, 7, 0)
    assert engine.seen == ["a4", "a7", "a0"]
    assert engine.asked == []


async def test_a_listener_that_is_cancelled_while_a_name_is_looked_up_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_up: list[str] = []

    async def connect(_: Any, endpoint: str) -> None:
        looked_up.append(endpoint)
        if endpoint.startswith("tcp://slow"):
            await asyncio.sleep(60)

    monkeypatch.setattr(listen, "connect", connect)
    endpoints = ["tcp://quick:1", "tcp://slow:2", "tcp://quick:3"]
    listener = Listener([KvEventsConfig(endpoint=endpoint) for endpoint in endpoints])
    before = asyncio.all_tasks()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0), listener:
            await listener.next(60)
    assert looked_up == endpoints
    assert asyncio.all_tasks() == before
    assert listener.closed


async def test_an_invalid_endpoint_is_reported_and_leaves_nothing_behind() -> None:
    listener = Listener([KvEventsConfig(endpoint=endpoint) for endpoint in ("tcp://127.0.0.1:1", "tcp://none")])
    before = asyncio.all_tasks()
    with pytest.raises(CannotListen, match="tcp://none: Invalid"):
        async with listener:
            await listener.next(10)
    assert asyncio.all_tasks() == before
    assert listener.closed
