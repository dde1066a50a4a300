"""The ladder of a replay, against what is known of the trace and of the bounds."""

from __future__ import annotations

import pytest

from matrixinfer.study.faults import Fault
from matrixinfer.study.policies import POLICIES
from matrixinfer.study.runs import replay
from matrixinfer.study.trace import LetterBlocks
from matrixinfer.traffic.ladder.rungs import Ladder

from .support import chats, fleet


def shares(ladder: Ladder) -> dict[str, float]:
    return {rung.name: rung.share for rung in ladder.rungs if rung.share is not None}


def losses(ladder: Ladder) -> dict[str, float]:
    return {loss.name: loss.share for rung in ladder.rungs for loss in rung.losses}


@pytest.mark.parametrize("policy", ["round_robin", "session_sticky", "kv_aware", "pooled", "clairvoyant"])
def test_the_rungs_are_the_traces_ideal_the_bound_and_the_engines_hits(policy: str) -> None:
    trace = chats(think=20)
    settings = fleet(trace, pod_tokens=12_000)
    outcome, pooled = (replay(trace, settings, POLICIES[name]) for name in (policy, "pooled"))
    found = shares(outcome.ladder)
    assert found["ideal"] == pytest.approx(trace.ideal_hit_rate(LetterBlocks()), abs=0.002)
    bound = pooled.results["hit_rate"]
    assert bound is not None
    assert found["capacity"] == pytest.approx(bound, abs=0.08)
    assert found["reported"] == outcome.results["hit_rate"]
    assert found["ideal"] >= found["capacity"] >= found["perfect"] >= found["predicted"]
    assert outcome.ladder.requests == outcome.ladder.reported_requests == len(trace.turns)
    assert outcome.ladder.capacity_tokens == 3 * 12_000
    if policy == "pooled":
        assert found["perfect"] == pytest.approx(found["predicted"])


def test_each_condition_shows_as_its_cause() -> None:
    trace = chats(think=20)
    roomy = replay(trace, fleet(trace, pod_tokens=100_000), POLICIES["kv_aware"]).ladder
    assert losses(roomy).get("evicted", 0.0) == losses(roomy).get("emptied", 0.0) == 0.0
    small = replay(trace, fleet(trace, pod_tokens=4_000), POLICIES["kv_aware"]).ladder
    assert losses(small)["evicted"] > 0.2
    blind = replay(trace, fleet(trace, pod_tokens=100_000), POLICIES["round_robin"]).ladder
    assert losses(blind).get("scored", 0.0) + losses(blind).get("busier", 0.0) > 0.2
    restart = Fault(kind="restart", at=40.0, pod=1, value=1.0)
    restarted = replay(trace, fleet(trace, pod_tokens=100_000, faults=(restart,)), POLICIES["kv_aware"]).ladder
    assert losses(restarted)["emptied"] > 0.01


def test_what_a_gateway_has_not_heard_of_is_not_blamed_on_its_profile() -> None:
    trace = chats(interval=0.5, think=1)
    late = replay(trace, fleet(trace, pod_tokens=100_000, gateways=4, event_delay=30.0), POLICIES["kv_aware"]).ladder
    assert losses(late)["unheard"] > losses(late).get("scored", 0.0)
