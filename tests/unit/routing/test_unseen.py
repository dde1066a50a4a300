from __future__ import annotations

from collections.abc import Mapping

import pytest

from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.routing.observed import Observed
from matrixinfer.routing.unseen import Unseen
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.message import Load

PODS = [f"pod-{n}" for n in range(8)]


class Gateway:
    """One of several gateways, which gets bursts of requests as all of them do."""

    def __init__(self, name: str) -> None:
        self.now = 100.0
        self.load, self.peers = LoadLedger(lambda: self.now, 2.0), PeerLoads(name)
        self.observed = Observed(self.load, self.peers)
        self.unseen = Unseen(self.load, self.peers, self.observed)

    def burst(self, pods: list[str], tokens: int = 1_000) -> None:
        charges = [self.load.charge(pod, "m", hashes=(), start=0, queued_tokens=tokens) for pod in pods]
        self.now += 1.0
        for charge in charges:
            charge.first_byte()
            charge.release()
        self.now += 10.0

    def expected(self) -> Mapping[str, float]:
        return self.unseen.expected(PODS, self.now)


def gateways(count: int) -> list[Gateway]:
    """They have heard of each other, and of each one's load."""
    made = [Gateway(f"gateway-{n}") for n in range(count)]
    for each in made:
        for _ in range(40):
            each.burst(["pod-0", "pod-1", "pod-2"])
    for each in made:
        for other in made:
            if other is not each:
                each.peers.update(other.peers.gateway, {}, each.now)
    return made


def test_gateways_that_hear_each_other_deal_the_pods_out() -> None:
    mine = [{pod for pod in PODS if pod not in each.expected()} for each in gateways(4)]
    assert [len(pods) for pods in mine] == [2, 2, 2, 2]
    assert set[str]().union(*mine) == set(PODS)


def test_the_least_loaded_pods_are_dealt_first_and_cost_most_to_others() -> None:
    two = gateways(2)
    loads = {pod: Load(n, 1_000 * n) for n, pod in enumerate(PODS)}
    one, other = two
    one.peers.publishes(loads)
    other.peers.update("gateway-0", loads, other.now)
    expected, by_other = one.expected(), other.expected()
    assert list(expected) == ["pod-1", "pod-3", "pod-5", "pod-7"]
    assert list(by_other) == ["pod-0", "pod-2", "pod-4", "pod-6"]
    assert sorted(expected.values(), reverse=True) == list(expected.values())
    assert expected["pod-1"] < 1_000.0  # not even one request is certain


def test_alone_nothing_is_expected_of_others() -> None:
    (alone,) = gateways(1)
    for n in range(100):  # its engines count what it counts
        alone.observed.foreign("pod-0", 0, alone.now + n, alone.now + n)
    assert alone.expected() == {}


def test_requests_that_never_come_together_need_no_dealing() -> None:
    one, other = Gateway("gateway-0"), Gateway("gateway-1")
    for _ in range(40):
        one.burst(["pod-0"])
    one.peers.update(other.peers.gateway, {}, one.now)
    assert one.expected() == {}


def strangers(name: str) -> Gateway:
    """A gateway that hears no other, though its engines have as many requests of others as of its own."""
    made = Gateway(name)
    for _ in range(60):
        charges = [made.load.charge("pod-0", "m", hashes=(), start=0, queued_tokens=1_000) for _ in range(3)]
        made.now += 1.0
        made.observed.foreign("pod-0", 6, made.now, made.now)
        for charge in charges:
            charge.first_byte()
            charge.release()
        made.now += 1.0
    return made


def test_gateways_that_cannot_hear_each_other_prefer_different_pods() -> None:
    orders = set()
    for name in ("a", "b", "c", "d"):
        expected = strangers(name).expected()
        assert set(expected) == set(PODS)
        orders.add(tuple(sorted(expected, key=expected.__getitem__)))
    assert len(orders) == 4


def test_what_an_engine_has_stored_for_others_shows_their_requests_before_its_gauges_do() -> None:
    gateway, cache = strangers("a"), Footprint()
    cache.held_tokens = 5_000
    gateway.observed.foreign("pod-0", 0, gateway.now, gateway.now)
    assert gateway.observed.came("pod-0", cache) == 0
    cache.held_tokens += 2_000
    assert gateway.observed.came("pod-0", cache) == 2
    own = gateway.load.charge("pod-0", "m", hashes=(), start=0, queued_tokens=1_000)
    cache.held_tokens += 1_000  # of the own request
    assert gateway.observed.came("pod-0", cache) == 2
    own.first_byte()
    assert gateway.observed.came("pod-0", cache) == 2
    cache.held_tokens, cache.evicted_tokens = 4_000, 7_000  # what was evicted was stored, too
    assert gateway.observed.came("pod-0", cache) == 5
    gateway.now += 1.0
    gateway.observed.foreign("pod-0", 5, gateway.now, gateway.now)  # now the gauges show them
    assert gateway.observed.came("pod-0", cache) == 0


def test_a_cache_that_was_cleared_shows_nobody() -> None:
    gateway, cache = strangers("a"), Footprint()
    cache.held_tokens = 5_000
    gateway.observed.foreign("pod-0", 0, gateway.now, gateway.now)
    assert gateway.observed.came("pod-0", cache) == 0
    cache.holds(0)
    assert gateway.observed.came("pod-0", cache) == 0
    assert gateway.observed.came("pod-1", None) == 0


def test_an_endpoint_that_has_gone_leaves_nothing() -> None:
    gateway = strangers("a")
    before = gateway.expected()["pod-3"]
    gateway.unseen.forget("pod-3")
    gateway.unseen.forget("pod-3")
    assert gateway.expected()["pod-3"] == pytest.approx(before)
