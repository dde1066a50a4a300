from __future__ import annotations

import pytest

from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.message import Load


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.load = LoadLedger(lambda: self.now, 2.0)

    def send(self, tokens: int, *, streams: bool = True) -> Charge:
        return self.load.charge("a", "m", hashes=(), start=0, queued_tokens=tokens, streams=streams)

    def queue(self) -> float:
        return self.load.view("a", self.now).queue_seconds


def test_the_queue_takes_as_long_as_its_tokens_and_shrinks_while_they_are_computed() -> None:
    world = World()
    assert world.queue() == 0.0
    world.send(8_000)
    second = world.send(16_000)
    assert world.queue() == pytest.approx(3.0)
    world.now += 0.5
    assert world.queue() == pytest.approx(2.5)
    assert world.load.view("a", world.now)[:2] == (2, 24_000)
    second.cancel()
    assert world.queue() == pytest.approx(0.5)


def test_the_end_of_a_long_prompt_takes_longer_than_its_start() -> None:
    world = World()
    start = world.load.charge("a", "m", hashes=(), start=0, queued_tokens=8_000, prompt_tokens=8_000)
    assert world.queue() == pytest.approx(1.08)
    start.release()
    world.load.charge("a", "m", hashes=(), start=0, queued_tokens=8_000, prompt_tokens=104_000)
    assert world.queue() == pytest.approx(3.0)


def test_an_answer_that_is_overdue_shows_that_the_pod_is_slower() -> None:
    world = World()
    world.send(8_000)
    world.send(8_000)
    world.now += 1.5
    assert world.queue() == pytest.approx(1.0)  # what is late by little is computed any moment
    world.now += 3.0
    slow = world.load.view("a", world.now)
    assert slow.rate == pytest.approx(8_000 / 3)
    assert slow.queue_seconds > 4.0
    world.now += 1e6
    assert world.queue() < 100.0


def test_the_rate_is_learnt_from_first_bytes_with_the_tokens_that_were_ahead() -> None:
    world = World()
    first, second = world.send(1_000), world.send(1_000)
    world.now += 1.0
    first.first_byte()
    world.now += 1.0
    second.first_byte()
    assert world.load.view("a", world.now).rate == pytest.approx(1_000)
    first.first_byte()  # again
    first.release()
    assert world.load.view("a", world.now + 2.0).rate == pytest.approx(1_000)


def test_requests_that_fail_or_were_charged_late_teach_nothing() -> None:
    world = World()
    world.send(1_000).cancel()
    late = world.send(1_000)
    late.untimed()
    world.now += 50.0
    late.first_byte()
    late.release()
    assert world.load.view("a", world.now).rate == pytest.approx(8_000)


def test_the_prompt_of_an_answer_that_is_not_streamed_is_taken_as_computed_in_time() -> None:
    world = World()
    whole = world.send(8_000, streams=False)
    streamed = world.send(8_000)
    world.now += 0.5
    assert world.load.view("a", world.now)[:2] == (2, 16_000)
    world.now += 0.6
    assert world.load.view("a", world.now)[:2] == (2, 8_000)
    world.now += 30.0
    streamed.first_byte()
    whole.release()
    assert world.load.view("a", world.now)[:2] == (1, 0)
    streamed.release()
    assert (world.load.loads(), world.load.queued_tokens("a")) == ({}, 0)


def test_what_was_in_flight_is_known_for_the_time_of_a_reading() -> None:
    world = World()
    first, second = world.send(1), world.send(1)
    world.now = 101.0
    first.release()
    world.now = 102.0
    second.release()
    world.now = 103.0
    found = [world.load.most_in_flight("a", at) for at in (100.5, 101.05, 101.5, 102.05, 102.5, 200.0, 0.0)]
    assert found == [2, 2, 1, 1, 0, 0, 0]
    assert world.load.most_in_flight("b", 100.5) == 0


def test_what_peers_had_in_flight_is_known_as_soon_as_they_report_it() -> None:
    peers = PeerLoads()
    peers.update("p", {"a": Load(3, 0)}, 100.0)
    peers.update("p", {"a": Load(1, 0)}, 101.0)
    peers.update("p", {}, 102.0)
    assert [peers.most_in_flight("a", at) for at in (99.8, 100.5, 101.3, 101.7, 105.0)] == [3, 3, 1, 1, 0]
    peers.update("q", {"a": Load(2, 0)}, 103.0)
    peers.totals(200.0)  # it is silent
    assert (peers.most_in_flight("a", 104.0), peers.most_in_flight("a", 205.0)) == (2, 0)
