from __future__ import annotations

import pytest

from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.routing.observed import HALF_LIFE_SECONDS, Observed
from matrixinfer.scheduler.framework import Condition
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.message import Load


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.load, self.peers = LoadLedger(lambda: self.now, 2.0), PeerLoads()
        self.observed = Observed(self.load, self.peers)

    def send(self) -> Charge:
        return self.load.charge("a", "m", hashes=(), start=0, queued_tokens=10)

    def foreign(self, counted: int, read_at: float) -> int:
        return self.observed.foreign("a", counted, read_at, self.now)


def test_requests_that_ended_after_the_reading_are_not_taken_for_those_of_others() -> None:
    world = World()
    charges = [world.send() for _ in range(4)]
    world.now = 101.0  # the engine is read: 4 running
    world.now = 101.3
    for charge in charges:
        charge.release()
    assert (world.foreign(4, 101.0), world.load.in_flight("a")) == (0, 0)
    assert world.foreign(7, 101.5) == 7  # the next reading: nothing of ours was there


def test_what_others_send_counts_beside_what_we_have_sent_since() -> None:
    world = World()
    first = world.send()
    world.now = 101.0
    assert world.foreign(4, 101.0) == 3
    first.release()
    world.send()
    world.now = 101.9
    assert world.foreign(4, 101.0) == 3


def test_a_gauge_that_has_not_seen_our_requests_yet_shows_nobody_else() -> None:
    world = World()
    for _ in range(5):
        world.send()
    assert world.foreign(0, 100.0) == 0


def test_requests_of_peers_are_not_those_of_strangers_even_if_reported_after_the_reading() -> None:
    world = World()
    world.peers.update("p", {"a": Load(2, 0)}, 99.9)
    assert world.foreign(5, 100.0) == 3
    world.now = 100.3
    world.peers.update("p", {"a": Load(4, 0)}, 100.3)  # on its way when the engine was read
    world.now = 100.6
    assert world.foreign(5, 100.0) == 1


def test_the_turnover_is_what_is_evicted_per_second_and_fades() -> None:
    world, footprint = World(), Footprint()

    def turnover(now: float) -> float:
        return world.observed.condition("a", now, rate=1.0, footprint=footprint, reported=None).evicted_per_second

    assert turnover(100.0) == 0.0
    for second in range(1, 600):
        footprint.evicted_tokens += 500
        rate = turnover(100.0 + second)
    assert rate == pytest.approx(500, rel=0.01)
    assert turnover(699.5) == rate  # once a second is enough
    assert turnover(699.0 + HALF_LIFE_SECONDS) == pytest.approx(250, rel=0.05)
    world.observed.forget("a")
    assert turnover(800.0) == 0.0


def test_a_condition_is_as_known_within_the_last_moment() -> None:
    world, footprint = World(), Footprint()

    def condition(now: float) -> Condition:
        return world.observed.condition("a", now, rate=2_000.0, footprint=footprint, reported=400)

    footprint.holds(100)
    expected = Condition(prefill_rate=2_000.0, held_tokens=100, cache_tokens=400)
    assert condition(100.0) == expected
    footprint.holds(200)
    assert condition(100.05) == expected
    assert condition(100.2).held_tokens == 200
    unknown = world.observed.condition("b", 100.0, rate=2_000.0, footprint=None, reported=400)
    assert unknown == Condition(prefill_rate=2_000.0)
