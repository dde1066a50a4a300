from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from matrixinfer import Candidate, Index, Selector
from matrixinfer.errors import ConfigError, InvalidRequest, NoPodAvailable
from matrixinfer.testing import FakeClock, FakeEngine, candidate

PROMPT = list(range(320))
PODS = ("a", "b", "c")


class Fleet:
    """Three engines that are followed, and a selector over them."""

    def __init__(self, *, policy: str | None = None, **config: object) -> None:
        self.clock = FakeClock(100.0)
        self.index = Index(block_size=16)
        self.engines = {pod: FakeEngine() for pod in PODS}
        for pod in PODS:
            self.index.follow(pod, model="m", can_replay=True)
            replay = self.index.wanted(pod)
            assert replay is not None
            self.index.replayed(replay, [])
        self.selector = Selector(self.index, policy=policy, config=config, clock=self.clock)

    def store(self, pod: str, tokens: list[int] = PROMPT) -> None:
        self.index.apply(pod, *self.engines[pod].store(tokens))

    def seen(self, pod: str, tokens: list[int] | None = PROMPT) -> Candidate:
        """The pod as the next decision sees it."""
        decision = self.selector.select(tokens, PODS, model="m", dry_run=True)
        return next(each for each in decision.candidates if each.name == pod)


def test_the_pod_that_holds_the_prompt_is_chosen() -> None:
    fleet = Fleet()
    fleet.store("b")
    decision = fleet.selector.select(PROMPT, PODS, model="m", request_id="r-1")
    assert (decision.chosen.name, decision.chosen.matched_blocks, decision.chosen.trust) == ("b", 20, "exact")
    assert [each.matched_blocks for each in decision.candidates] == [0, 20, 0]
    assert decision.request.id == "r-1"
    assert decision.chosen.predicted_hit(320, 16) == 304  # never the last token


def test_engine_blocks_of_another_size_match_to_the_token() -> None:
    fleet = Fleet()
    fleet.engines["b"] = FakeEngine(block_size=24)
    fleet.store("b", PROMPT[:240])
    seen = fleet.seen("b", PROMPT[:245])
    assert (seen.engine_block, seen.matched_blocks) == (24, 15)
    fleet.store("b", PROMPT[:264])
    seen = fleet.seen("b", PROMPT)
    assert (seen.matched_blocks, seen.matched_tail) == (16, 8)


def test_a_charge_counts_until_the_request_ends() -> None:
    fleet = Fleet()
    decision = fleet.selector.select(PROMPT, ["a"], model="m")
    with fleet.selector.charge(decision) as request:
        seen = fleet.seen("a")
        assert (seen.in_flight, seen.queued_tokens, seen.pending_blocks) == (1, 320, 20)
        request.first_byte()
        assert fleet.seen("a").queued_tokens == 0
    seen = fleet.seen("a")
    assert (seen.in_flight, seen.pending_blocks) == (0, 20)
    fleet.clock.advance(2.0)
    assert fleet.seen("a").pending_blocks == 0


def test_the_next_decision_follows_a_charge() -> None:
    fleet = Fleet()
    first = fleet.selector.select(PROMPT, PODS, model="m")
    fleet.selector.charge(first).first_byte()
    assert fleet.selector.select(PROMPT, PODS, model="m").chosen.name == first.chosen.name


def test_a_request_that_raises_leaves_nothing_unless_its_answer_had_begun() -> None:
    fleet = Fleet()
    decision = fleet.selector.select(PROMPT, ["a"], model="m")
    for begun, pending in ((False, 0), (True, 20)):
        with suppress(ConnectionError), fleet.selector.charge(decision) as request:
            if begun:
                request.first_byte()
            raise ConnectionError
        seen = fleet.seen("a")
        assert (seen.in_flight, seen.queued_tokens, seen.pending_blocks) == (0, 0, pending)


def test_a_request_moves_to_another_candidate() -> None:
    fleet = Fleet()
    decision = fleet.selector.select(PROMPT, PODS, model="m")
    first, second, _ = decision.attempts
    request = fleet.selector.charge(decision)
    request.move(second)
    assert request.candidate is second
    assert (fleet.seen(first.name).in_flight, fleet.seen(first.name).pending_blocks) == (0, 0)
    assert (fleet.seen(second.name).in_flight, fleet.seen(second.name).pending_blocks) == (1, 20)
    for _ in range(2):
        request.finish()
    request.cancel()
    assert (fleet.seen(second.name).in_flight, fleet.seen(second.name).pending_blocks) == (0, 20)


def test_a_decision_may_be_charged_to_another_of_its_candidates() -> None:
    fleet = Fleet()
    decision = fleet.selector.select(PROMPT, PODS, model="m")
    fleet.selector.charge(decision, decision.ranked[-1])
    assert fleet.seen(decision.ranked[-1].name).in_flight == 1
    assert fleet.seen(decision.chosen.name).in_flight == 0


def test_load_that_the_caller_knows_of_is_added() -> None:
    fleet = Fleet()
    known = candidate("a", in_flight=3, queued_tokens=100, running=7, waiting=1, cache_usage=0.5, engine_block=64)
    fleet.selector.charge(fleet.selector.select(PROMPT, [known], model="m"))
    seen = fleet.selector.select(PROMPT, [known], model="m").chosen
    assert (seen.in_flight, seen.queued_tokens) == (4, 420)
    assert (seen.running, seen.waiting, seen.cache_usage, seen.engine_block) == (7, 1, 0.5, 64)


def test_requests_that_ended_since_the_engine_was_read_do_not_count() -> None:
    fleet = Fleet()
    sent = fleet.selector.charge(fleet.selector.select(PROMPT, ["a"], model="m"))
    fleet.clock.advance(1.0)
    read = candidate("a", running=3, waiting=0, metrics_age=0.0)
    assert (fleet.selector.select(PROMPT, [read], model="m").chosen.load) == 3
    fleet.clock.advance(0.5)
    sent.finish()
    later = candidate("a", running=3, waiting=0, metrics_age=0.5)
    seen = fleet.selector.select(PROMPT, [later], model="m").chosen
    assert (seen.foreign, seen.load) == (2, 2)


def test_the_selector_estimates_queues_and_speeds() -> None:
    fleet = Fleet()
    sent = fleet.selector.charge(fleet.selector.select(PROMPT, ["x"], model="m"))
    fleet.clock.advance(2.0)
    sent.first_byte()
    with fleet.selector.charge(fleet.selector.select(PROMPT, ["y"], model="m")):
        seen = fleet.selector.select(PROMPT, ["y"], model="m", dry_run=True).chosen
    assert seen.condition.prefill_rate == pytest.approx(len(PROMPT) / 2.0, rel=0.01)  # attention counts a little
    assert seen.queue_seconds == pytest.approx(2.0)


def test_a_pod_without_events_is_known_by_what_was_sent_to_it() -> None:
    fleet = Fleet()
    decision = fleet.selector.select(PROMPT, ["x"], model="m")
    assert (decision.chosen.trust, decision.chosen.matched_blocks) == ("none", None)
    fleet.selector.charge(decision).finish()
    fleet.clock.advance(10.0)
    seen = fleet.selector.select(PROMPT, ["x", "y"], model="m").chosen
    assert (seen.name, seen.recent_blocks, seen.credit) == ("x", 20, 15.0)


def test_an_exact_pod_is_not_guessed_at() -> None:
    fleet = Fleet()
    fleet.selector.charge(fleet.selector.select(PROMPT, ["a"], model="m")).finish()
    fleet.clock.advance(10.0)
    seen = fleet.seen("a")
    assert (seen.matched_blocks, seen.recent_blocks, seen.pending_blocks) == (0, 0, 0)


def test_a_forgotten_pod_leaves_nothing_also_when_its_requests_end_later() -> None:
    fleet = Fleet()
    fleet.store("a")
    old, other = fleet.selector.select(PROMPT, ["x"], model="m"), fleet.selector.select(PROMPT, ["a"], model="m")
    requests = [fleet.selector.charge(old), fleet.selector.charge(other)]
    for pod in ("x", "a"):
        fleet.selector.forget(pod)
    for request in requests:
        request.finish()
    for pod in ("x", "a"):
        seen = fleet.selector.select(PROMPT, [pod], model="m").chosen
        assert (seen.in_flight, seen.pending_blocks, seen.recent_blocks, seen.trust) == (0, 0, 0, "none")


def test_what_is_not_tokenized_is_routed_by_load() -> None:
    fleet = Fleet()
    fleet.store("a")
    decision = fleet.selector.select(None, [candidate("a", in_flight=9), candidate("b")], model="m")
    assert (decision.chosen.name, decision.request.prompt_tokens, decision.candidates[0].matched_blocks) == (
        "b",
        None,
        None,
    )
    assert any("not tokenized" in note for note in decision.notes)


def test_a_dry_run_changes_nothing() -> None:
    fleet = Fleet(policy="round_robin")
    dry = [fleet.selector.select(PROMPT, PODS, model="m", dry_run=True).chosen.name for _ in range(3)]
    wet = [fleet.selector.select(PROMPT, PODS, model="m").chosen.name for _ in range(3)]
    assert len(set(dry)) == 1
    assert sorted(wet) == list(PODS)


def test_salts_and_models_are_distinguished() -> None:
    fleet = Fleet()
    fleet.store("a")
    assert fleet.selector.select(PROMPT, ["a"], model="m", salt="s").chosen.matched_blocks == 0
    assert fleet.selector.select(PROMPT, ["a"], model="n").chosen.matched_blocks == 0


def test_session_and_prefix_reach_the_plugins() -> None:
    fleet = Fleet(policy="cache_aware")
    first = fleet.selector.select(None, PODS, model="m", prefix=b"x" * 4000, session="s")
    fleet.selector.charge(first).finish()
    assert first.request.session == "s"
    again = {fleet.selector.select(None, PODS, model="m", prefix=b"x" * 4000).chosen.name for _ in range(5)}
    assert again == {first.chosen.name}


def test_the_configuration_has_the_keys_of_the_gateway() -> None:
    fleet = Fleet(pendingSeconds=5.0, weights={"unproven": 0.5})
    fleet.selector.charge(fleet.selector.select(PROMPT, ["x"], model="m")).finish()
    fleet.clock.advance(4.0)
    assert fleet.selector.select(PROMPT, ["x"], model="m").chosen.pending_blocks == 20
    fleet.clock.advance(2.0)
    assert fleet.selector.select(PROMPT, ["x"], model="m").chosen.credit == 10.0
    assert set(fleet.selector.rejected.values()) == {0}


def test_wrong_values_are_named() -> None:
    index = Index(block_size=16)
    with pytest.raises(ConfigError, match="unknown policy `fastest`; there are: cache_aware, cached_share, kv_aware"):
        Selector(index, policy="fastest")
    with pytest.raises(ConfigError, match=r"\$\.scheduler\.pendingSecond"):
        Selector(index, config={"pendingSecond": 1})
    with pytest.raises(ConfigError, match=r"\$\.scheduler: expected plain data"):
        Selector(index, config={"weights": object()})
    given = {"pluginConfig": [{"name": "kvcache-aware", "args": {"blockSizeToHash": 128}}]}
    with pytest.raises(ConfigError, match=r"args\.blockSizeToHash: expected 16, as the index has it, got 128"):
        Selector(index, config=given)
    selector = Selector(index)
    with pytest.raises(NoPodAvailable):
        selector.select(PROMPT, [], model="m")
    with pytest.raises(InvalidRequest, match="candidates: expected each name once"):
        selector.select(PROMPT, ["a", "a"], model="m")
    with pytest.raises(InvalidRequest, match="token_ids"):
        selector.select([-5] * 20, ["a"], model="m")


@pytest.mark.parametrize(
    "candidates",
    [None, "a", 5, [5], [None], [b"a"], [["a"]], [Candidate(name=5, url="")], [candidate("a", in_flight=None)]],  # type: ignore[arg-type]
)
def test_what_is_no_list_of_candidates_is_refused(candidates: Any) -> None:
    with pytest.raises(InvalidRequest, match="candidates: expected"):
        Fleet().selector.select(PROMPT, candidates, model="m")


@pytest.mark.parametrize("wrong", [{"model": None}, {"salt": 5}, {"prefix": "text"}])
def test_an_argument_of_another_type_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{next(iter(wrong))}: expected"):
        Fleet().selector.select(PROMPT, PODS, **{"model": "m", **wrong})


@pytest.mark.parametrize("wrong", [{"policy": []}, {"policy": 5}, {"config": 5}, {"config": []}])
def test_a_setting_of_another_type_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        Selector(Index(), **wrong)


def test_what_the_engine_has_evicted_is_not_pending_after_its_request() -> None:
    fleet = Fleet()
    fleet.selector.charge(fleet.selector.select(PROMPT, ["a"], model="m")).finish()
    fleet.store("a")
    assert fleet.seen("a").predicted_hit(320, 16) == 304
    fleet.index.apply("a", *fleet.engines["a"].clear())
    assert (fleet.seen("a").pending_blocks, fleet.seen("a").predicted_hit(320, 16)) == (0, 0)
