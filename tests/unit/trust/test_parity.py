from __future__ import annotations

from typing import Any, cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from matrixinfer.blocks import TokenBlockProcessor, token_bytes
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

    def count(self, *engines: int, model: str = "m", request_class: str = "text") -> None:
        for each in engines:
            self.parity.counted(model, request_class, pod="p", path="/v1/completions", ours=10, engines=each)

    def is_approximate(self, model: str = "m", request_class: str = "text") -> bool:
        return self.parity.is_approximate(model, request_class)

    def feed(self) -> PodFeed:
        return PodFeed(Ledger(pod="p", model="m", blocks=self.blocks, index=MemoryIndex()), can_replay=True)

    def sample(self, feed: PodFeed | None = None, *seen: int | None, computed: bool = True) -> None:
        """A request whose chain, if it is `seen`, differs there or not at all."""
        feed, ids = feed or self.feed(), np.arange(8, dtype=np.uint32)
        present = self.parity.sampling.enter(feed, "m", ids)
        witness = Witness("m", ids, self.blocks.chain(ids), held=0, block_size=4)
        sample = self.parity.sampling.watch(
            feed, witness, present, model="m", request_class="text", pod="p", path="/v1/completions"
        )
        assert sample is not None
        for at in seen:
            theirs = ids.copy()
            theirs[len(ids) if at is None else at :] = 99
            witness.chains += 1
            if at is None:
                witness.equal = token_bytes(theirs)
            else:
                witness.strange.append(token_bytes(theirs))
        self.parity.sampling.leave(present)
        self.parity.sampling.finished(sample, computed=computed)

    def settled(self) -> Any:
        self.now += 2.0
        return cast("dict[str, Any]", self.parity.view())["m"]["classes"]["text"]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"matrixinfer_tokenizer_{name}", labels)


def test_counts_that_agree_and_differ_are_counted() -> None:
    world = World()
    world.count(10, 11, 10)
    assert world.metric("parity_total", model="m", **{"class": "text"}, check="usage", result="agreed") == 2
    assert world.metric("parity_total", model="m", **{"class": "text"}, check="usage", result="mismatch") == 1
    assert not world.is_approximate()
    assert not world.is_approximate("another")


def test_a_run_of_mismatches_distrusts_a_model_until_it_has_agreed_as_often() -> None:
    world = World()
    with capture_logs() as logs:
        world.count(*[11] * (RUN - 1), 10, *[11] * (RUN - 1))
        assert not world.is_approximate()
        world.count(11)
        assert world.is_approximate()
        assert world.metric("approximate", model="m", **{"class": "text"}) == 1
        world.count(*[10] * (RUN - 1), 11, *[10] * (RUN - 1))
        assert world.is_approximate()
        world.count(10)
    assert not world.is_approximate()
    assert world.metric("approximate", model="m", **{"class": "text"}) == 0
    events = [entry["event"] for entry in logs]
    assert events.count("tokenizer_distrusted") == events.count("tokenizer_trusted") == 1
    assert logs[0] == {
        "event": "tokenizer_differed",
        "log_level": "warning",
        "model": "m",
        "class": "text",
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
    assert world.is_approximate("n")
    assert not world.is_approximate()


def test_a_long_run_is_logged_less_and_less_often() -> None:
    world = World()
    with capture_logs() as logs:
        world.count(*[11] * 1000)
    assert 10 <= len(logs) <= 15
    world = World()
    with capture_logs() as logs:
        world.count(*[11, 10] * 1000)
    assert 10 <= len(logs) <= 15


def test_one_class_of_requests_says_nothing_of_another() -> None:
    world = World()
    world.count(*[11] * RUN, request_class="chat+tools")
    world.count(10, request_class="chat")
    assert world.is_approximate(request_class="chat+tools")
    assert not world.is_approximate(request_class="chat")
    assert world.metric("approximate", model="m", **{"class": "chat+tools"}) == 1
    view = cast("dict[str, Any]", world.parity.view())["m"]
    assert view["approximate"]
    assert {name: each["approximate"] for name, each in view["classes"].items()} == {"chat": False, "chat+tools": True}
    world.parity.keep_models({"n"})
    assert world.parity.view() == {}


def test_ids_that_agree_and_differ_in_the_events_are_counted() -> None:
    world = World()
    world.sample(None, None)
    with capture_logs() as logs:
        world.sample(None, 5)
        checks = world.settled()["events"]
    assert (checks["agreed"], checks["mismatched"], checks["inconclusive"]) == (1, 1, 0)
    assert [entry["first_difference"] for entry in logs] == [5]


def test_a_request_that_was_not_computed_proves_nothing() -> None:
    world = World()
    world.sample(None, 5, computed=False)
    assert world.settled()["events"]["inconclusive"] == 1


def test_counts_that_agree_do_not_excuse_ids_that_differ() -> None:
    world = World()
    for _ in range(RUN):
        world.sample(None, 5)
        world.count(10)
    assert world.settled()["approximate"]
    for _ in range(RUN):
        world.count(10)
    assert world.is_approximate()
    for _ in range(RUN):
        world.sample(None, None)
    assert not world.settled()["approximate"]


def test_every_request_of_a_class_is_sampled_until_a_run_agrees_and_then_few() -> None:
    world = World()
    assert all(world.parity.is_due("m", "chat", "p") for _ in range(100))
    for _ in range(RUN):
        world.sample(None, None)
    world.settled()
    due = 0
    for _ in range(10 * SAMPLED_EVERY):
        if world.parity.is_due("m", "text", "p"):
            world.parity.sampled("m", "text")
            due += 1
    assert due == 10
    assert world.parity.is_due("m", "chat", "p")
    world.sample(None, 5)
    world.settled()
    assert world.parity.is_due("m", "text", "p")


@given(st.lists(st.booleans(), max_size=40))
def test_trust_changes_only_after_a_whole_run(agreements: list[bool]) -> None:
    world, expected = World(), False
    for i, agrees in enumerate(agreements):
        world.count(10 if agrees else 11)
        last = agreements[max(0, i + 1 - RUN) : i + 1]
        if len(last) == RUN and len(set(last)) == 1:
            expected = not agrees
        assert world.is_approximate() is expected


class Proving(World):
    """Endpoints are proven one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.parity = Parity(self.metrics, lambda: self.now, proves_endpoints=True)

    def prove(self, times: int = RUN) -> None:
        for _ in range(times):
            self.sample(None, None)
            self.settled()

    def is_proven(self, endpoint: str = "p") -> bool:
        return self.parity.is_proven("m", "text", endpoint)


def test_ids_are_proven_where_the_events_of_the_endpoint_have_shown_them() -> None:
    world = Proving()
    world.count(*[10] * 100)
    assert not world.is_proven()  # equal counts are no proof
    world.prove(RUN - 1)
    assert not world.is_proven()
    world.prove(1)
    assert world.is_proven()
    assert not world.is_proven("q")
    assert not world.parity.is_proven("m", "chat", "p")
    assert not world.parity.is_proven("n", "text", "p")


def test_one_difference_ends_the_proof_at_once() -> None:
    world = Proving()
    world.prove()
    world.count(11)
    assert not world.is_proven()
    world.count(10)
    assert not world.is_proven()  # the endpoint must show them again
    world.prove()
    assert world.is_proven()
    world.sample(None, 3)
    world.settled()
    assert not world.is_proven()


def test_a_difference_at_another_endpoint_ends_the_proof_until_events_agree_again() -> None:
    world = Proving()
    world.prove()
    world.parity.counted("m", "text", pod="q", path="/v1/completions", ours=10, engines=11)
    assert not world.is_proven()
    world.count(10)
    assert world.is_proven()
    assert not world.is_proven("q")


def test_every_endpoint_is_sampled_until_it_is_proven() -> None:
    world = Proving()
    world.prove()
    assert not world.parity.is_due("m", "text", "p")
    assert world.parity.is_due("m", "text", "q")


def test_a_proof_grows_stale_and_goes_with_the_endpoint() -> None:
    world = Proving()
    world.prove()
    for _ in range(10_000):
        world.parity.is_due("m", "text", "p")
    assert not world.is_proven()
    world.parity.sampled("m", "text")
    assert world.is_proven()
    world.parity.forget("p")
    assert not world.is_proven()


def test_another_tokenizer_of_the_model_must_be_proven_again() -> None:
    world = Proving()
    world.prove()
    world.parity.unprove("another")
    assert world.is_proven()
    world.parity.unprove("m")
    assert not world.is_proven()
    world.prove()
    assert world.is_proven()
