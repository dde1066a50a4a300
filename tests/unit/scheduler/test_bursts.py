"""The scheduler and the load ledger together: bursts neither scatter nor herd."""

from __future__ import annotations

from collections import Counter

import pytest

from matrixinfer.config import SchedulerConfig
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.traffic.load import Charge, LoadLedger

from .support import FakeClock, pod, request, scheduler


class Fleet:
    """Idle pods whose only state is what the ledger knows."""

    def __init__(self, count: int, made: Scheduler) -> None:
        self.names = [f"pod-{i}" for i in range(count)]
        self.ledger = LoadLedger(FakeClock(), 2.0)
        self.scheduler = made

    def candidates(self, chain: tuple[int, ...]) -> list[Candidate]:
        ledger = self.ledger
        return [
            pod(
                name,
                in_flight=ledger.in_flight(name),
                queued_tokens=ledger.queued_tokens(name),
                matched_blocks=0,
                pending_blocks=ledger.pending(name, "m", chain, 0),
            )
            for name in self.names
        ]

    def send(self, chain: tuple[int, ...]) -> tuple[str, Charge]:
        chosen = self.scheduler.schedule(request(chain=chain), self.candidates(chain)).chosen
        charge = self.ledger.charge(chosen.name, "m", hashes=chain, start=0, queued_tokens=40)
        return chosen.name, charge


def fleet_of(policy: str) -> Fleet:
    return Fleet(8, scheduler(with_policy(SchedulerConfig(plugin_config=()), policy)))


every_policy = pytest.mark.parametrize("policy", ["kv_aware", "cached_share"])


def test_equal_prompts_fill_one_pod_to_the_bound_and_then_the_next() -> None:
    fleet = fleet_of("cached_share")
    sent = [fleet.send((1, 2, 3, 4))[0] for _ in range(32)]
    runs = [name for i, name in enumerate(sent) if i == 0 or sent[i - 1] != name]
    assert len(set(sent[:4])) == 1  # the floor: they stay together
    assert runs[:4] == list(dict.fromkeys(runs))[:4]  # the next pod is taken once the first is full
    assert max(Counter(sent).values()) <= 5  # ceil(1.25 × 32 / 8)


@every_policy
def test_different_prompts_spread_evenly(policy: str) -> None:
    fleet = fleet_of(policy)
    sent = [fleet.send(tuple(range(i * 10, i * 10 + 4)))[0] for i in range(32)]
    assert sorted(sent[:8]) == fleet.names
    assert Counter(sent) == dict.fromkeys(fleet.names, 4)


@every_policy
def test_one_conversation_at_a_time_stays_on_its_pod(policy: str) -> None:
    fleet = fleet_of(policy)
    seen = set()
    for turn in range(1, 20):
        name, charge = fleet.send(tuple(range(turn * 4)))
        charge.release()
        seen.add(name)
    assert len(seen) == 1


@every_policy
def test_a_universal_prefix_does_not_collapse_onto_one_pod(policy: str) -> None:
    """Every prompt shares 60 % of its blocks, requests finish in order, 24 in flight on 8 pods."""
    fleet = fleet_of(policy)
    shared = tuple(range(6))
    open_charges: list[Charge] = []
    sent = Counter[str]()
    for i in range(400):
        name, charge = fleet.send((*shared, *range(1000 + i * 4, 1004 + i * 4)))
        sent[name] += 1
        open_charges.append(charge)
        if len(open_charges) > 24:
            open_charges.pop(0).release()
    assert max(sent.values()) <= 2 * 400 / 8
