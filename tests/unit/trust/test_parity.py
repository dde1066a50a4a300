from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.witness import Witness
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.parity import RUN, SAMPLED_EVERY, Parity


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.metrics = Metrics()
        self.parity = Parity(self.metrics, lambda: self.now)
        self.blocks = TokenBlockProcessor(4)

    def count(self, *engines: int, model: str = "m") -> None:
        for each in engines:
            self.parity.counted(model, pod="p", path="/v1/completions", ours=10, engines=each)

    def feed(self) -> PodFeed:
        return PodFeed(Ledger(pod="p", model="m", blocks=self.blocks, index=MemoryIndex()), can_replay=True)

    def witness(self, *, chains: int = 0, first_difference: int | None = None) -> Witness:
        ids = np.arange(8, dtype=np.uint32)
        made = Witness("m", ids, self.blocks.chain(ids), held=0, block_size=4)
        made.chains, made.first_difference = chains, first_difference
        return made

    def sample(self, feed: PodFeed | None = None, *, computed: bool = True, **seen: Any) -> None:
        feed = feed or self.feed()
        sample = self.parity.watch("m", "p", "/v1/completions", feed, self.witness(**seen))
        assert sample is not None
        self.parity.finished(sample, computed=computed)

    def settled(self) -> dict[str, Any]:
        self.now += 2.0
        return cast("dict[str, Any]", self.parity.view())

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"matrixinfer_tokenizer_{name}", labels)


def test_counts_that_agree_and_differ_are_counted() -> None:
    world = World()
    world.count(10, 11, 10)
    assert world.metric("parity_total", model="m", check="usage", result="agreed") == 2
    assert world.metric("parity_total", model="m", check="usage", result="mismatch") == 1
    assert not world.parity.is_approximate("m")
    assert not world.parity.is_approximate("another")


def test_a_run_of_mismatches_distrusts_a_model_until_it_has_agreed_as_often() -> None:
    world = World()
    with capture_logs() as logs:
        world.count(*[11] * (RUN - 1), 10, *[11] * (RUN - 1))
        assert not world.parity.is_approximate("m")
        world.count(11)
        assert world.parity.is_approximate("m")
        assert world.metric("approximate", model="m") == 1
        world.count(*[10] * (RUN - 1), 11, *[10] * (RUN - 1))
        assert world.parity.is_approximate("m")
        world.count(10)
    assert not world.parity.is_approximate("m")
    assert world.metric("approximate", model="m") == 0
    events = [entry["event"] for entry in logs]
    assert events.count("tokenizer_distrusted") == events.count("tokenizer_trusted") == 1
    assert logs[0] == {
        "event": "tokenizer_differed",
        "log_level": "warning",
        "model": "m",
        "check": "usage",
        "times": 1,
        "pod": "p",
        "path": "/v1/completions",
        "ours": 10,
        "engine": 11,
    }


def test_one_model_says_nothing_of_another() -> None:
    world = World()
    world.count(*[11] * RUN, model="n")
    world.count(10)
    assert world.parity.is_approximate("n")
    assert not world.parity.is_approximate("m")


def test_a_long_run_is_logged_less_and_less_often() -> None:
    world = World()
    with capture_logs() as logs:
        world.count(*[11] * 1000)
    assert 10 <= len(logs) <= 15
    world = World()
    with capture_logs() as logs:
        world.count(*[11, 10] * 1000)
    assert 10 <= len(logs) <= 15


def test_ids_that_agree_and_differ_in_the_events_are_counted() -> None:
    world = World()
    world.sample(chains=1)
    with capture_logs() as logs:
        world.sample(chains=1, first_difference=5)
        checks = world.settled()["m"]["events"]
    assert (checks["agreed"], checks["mismatched"], checks["inconclusive"]) == (1, 1, 0)
    assert [entry["first_difference"] for entry in logs] == [5]


@pytest.mark.parametrize("chains", [0, 2])
def test_no_chain_and_several_prove_nothing(chains: int) -> None:
    world = World()
    world.sample(chains=chains, first_difference=5)
    assert world.settled()["m"]["events"] == {"agreed": 0, "mismatched": 0, "inconclusive": 1, "streak": 0}


def test_a_request_that_was_not_computed_proves_nothing() -> None:
    world = World()
    world.sample(chains=1, first_difference=5, computed=False)
    assert world.settled()["m"]["events"]["inconclusive"] == 1


def test_a_feed_that_started_over_meanwhile_proves_nothing() -> None:
    world, feed = World(), World().feed()
    world.sample(feed, chains=1, first_difference=5)
    feed.start_over()
    assert world.settled()["m"]["events"]["inconclusive"] == 1


def test_counts_that_agree_do_not_excuse_ids_that_differ() -> None:
    world = World()
    for _ in range(RUN):
        world.sample(chains=1, first_difference=5)
        world.count(10)
    assert world.settled()["m"]["approximate"]
    for _ in range(RUN):
        world.count(10)
    assert world.parity.is_approximate("m")
    for _ in range(RUN):
        world.sample(chains=1)
    assert not world.settled()["m"]["approximate"]


def test_one_request_at_a_time_is_looked_for_at_a_pod_until_its_events_have_come() -> None:
    world, feed = World(), World().feed()
    sample = world.parity.watch("m", "p", "/", feed, world.witness(chains=1))
    assert sample is not None
    world.parity.finished(sample, computed=True)
    world.now += 0.5
    assert world.parity.is_watched(feed)
    assert feed.ledger.is_observed
    world.now += 1.0
    assert not world.parity.is_watched(feed)
    assert not feed.ledger.is_observed


def test_a_prompt_that_goes_on_from_the_same_place_ends_the_time_of_the_one_before() -> None:
    for chains, agreed in ((1, 1), (0, 0)):
        world, feed = World(), World().feed()
        sample = world.parity.watch("m", "p", "/", feed, world.witness(chains=chains))
        assert sample is not None
        assert world.parity.is_watched(feed)
        assert world.parity.watch("m", "p", "/", feed, world.witness()) is None
        assert not world.parity.is_watched(feed)
        sample.witness.chains += 1 - chains  # of the other one
        world.parity.finished(sample, computed=True)
        assert world.settled()["m"]["events"]["agreed"] == agreed


def test_a_prompt_that_goes_on_from_elsewhere_does_not() -> None:
    world, feed = World(), World().feed()
    sample = world.parity.watch("m", "p", "/", feed, world.witness())
    ids = np.arange(8, dtype=np.uint32)
    other = Witness("m", ids, world.blocks.chain(ids), held=4, block_size=4)
    assert world.parity.watch("m", "p", "/", feed, other) is None
    assert sample is not None
    assert feed.ledger.is_observed


def test_a_sample_whose_time_is_over_makes_way_for_the_next_though_nobody_asks() -> None:
    world, feed = World(), World().feed()
    for _ in range(5):
        assert not world.parity.is_watched(feed)
        world.sample(feed, chains=1)
        assert world.parity.is_watched(feed)
        world.now += 2.0
    assert not world.parity.is_watched(feed)
    assert world.metric("parity_total", model="m", check="events", result="agreed") == 5


def test_samples_are_few_and_bounded() -> None:
    world = World()
    assert sum(world.parity.is_due() for _ in range(10 * SAMPLED_EVERY)) == 10
    feeds = [world.feed() for _ in range(100)]
    watched = [world.parity.watch("m", "p", "/", feed, world.witness()) for feed in feeds]
    assert sum(each is not None for each in watched) == 64


@given(st.lists(st.booleans(), max_size=40))
def test_trust_changes_only_after_a_whole_run(agreements: list[bool]) -> None:
    world, expected = World(), False
    for i, agrees in enumerate(agreements):
        world.count(10 if agrees else 11)
        last = agreements[max(0, i + 1 - RUN) : i + 1]
        if len(last) == RUN and len(set(last)) == 1:
            expected = not agrees
        assert world.parity.is_approximate("m") is expected
