from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.supports import Supports
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.drift import RUN, SETTLE_SECONDS, STORED_WITHIN_SECONDS, WINDOW_SECONDS, Drift, Lookups
from matrixinfer.trust.prediction import Prediction


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.metrics = Metrics()
        self.resyncs: list[tuple[str, bool]] = []
        self.limits: list[tuple[str, bool]] = []
        self.drift = Drift(self.metrics, self._resync, lambda: self.now, lambda *each: self.limits.append(each))

    def _resync(self, name: str, *, replay: bool) -> None:
        self.resyncs.append((name, replay))

    def report(self, *cached: int | None, least: int = 64, name: str = "a") -> None:
        for each in cached:
            self.drift.reported(name, least=least, most=64, cached=each)

    def settle(self) -> None:
        """Let the events come that an answer with fewer cached tokens waits for."""
        self.now += SETTLE_SECONDS
        self.drift.doubts("a")

    def count(self, result: str) -> float:
        return self.metrics.registry.get_sample_value("matrixinfer_drift_total", {"pod": "a", "result": result}) or 0


def test_answers_are_counted_by_what_they_say_of_the_prediction() -> None:
    world = World()
    world.report(64, 80, 32)
    world.report(32, 48, 64, 80, 16, least=32)
    assert [world.count(result) for result in ("exact", "more", "fewer", "evicted")] == [1, 2, 2, 3]
    value = world.metrics.registry.get_sample_value
    assert value("matrixinfer_drift_reported_tokens_total", {"pod": "a"}) == 64 + 80 + 32 + 32 + 48 + 64 + 80 + 16
    assert value("matrixinfer_drift_predicted_tokens_total", {"pod": "a"}) == 64 + 64 + 64 + 32 + 48 + 64 + 64 + 32


def test_no_number_means_zero_once_an_engine_has_reported_one() -> None:
    world = World()
    world.report(None, None, None, None)
    assert world.count("fewer") == 0
    world.report(64, None)
    assert (world.count("exact"), world.count("fewer")) == (1, 1)


def test_a_run_of_fewer_has_the_pod_indexed_again() -> None:
    world = World()
    with capture_logs() as logs:
        world.report(*[32] * (RUN - 1), 64, *[32] * (RUN - 1))
        assert world.resyncs == []
        world.report(32)
    assert world.resyncs == [("a", True)]
    assert logs == [{"event": "kv_drift_detected", "log_level": "warning", "endpoint": "a", "replay": True}]
    assert world.metrics.registry.get_sample_value("matrixinfer_kv_resyncs_total", {"pod": "a"}) == 1


def test_what_was_evicted_before_the_answer_began_is_no_fault() -> None:
    world = World()
    world.report(*[32] * RUN, least=32)
    assert world.resyncs == []
    world.report(*[16] * RUN, least=32)
    assert world.resyncs == [("a", True)]


def test_what_cannot_be_healed_yet_is_doubted_until_an_answer_is_as_predicted() -> None:
    world = World()
    world.report(*[0] * RUN)
    assert not world.drift.doubts("a")
    world.report(*[0] * RUN)
    assert world.drift.doubts("a")
    world.report(64)
    assert not world.drift.doubts("a")


def test_what_a_replay_did_not_heal_is_forgotten_and_each_time_after_a_longer_pause() -> None:
    world = World()
    world.report(*[0] * RUN)
    world.report(*[0] * 100)
    assert world.resyncs == [("a", True)]
    world.now = 10.0
    world.report(*[0] * RUN)
    assert world.resyncs[1:] == [("a", False)]
    world.now = 29.0
    world.report(*[0] * RUN)
    assert len(world.resyncs) == 2
    world.now = 30.0
    world.report(*[0] * RUN)
    assert world.resyncs[2:] == [("a", True)]


def test_after_a_long_good_time_it_begins_as_the_first_time() -> None:
    world = World()
    world.report(*[0] * RUN)
    world.now = 1000.0
    world.report(*[0] * RUN)
    world.now = 1010.0
    world.report(*[0] * RUN)
    assert world.resyncs == [("a", True), ("a", True), ("a", False)]


def test_one_endpoint_says_nothing_of_another() -> None:
    world = World()
    world.report(0, 0)
    world.report(0, 0, name="b")
    assert world.resyncs == []
    world.drift.forget("a")
    world.report(0)
    assert world.resyncs == []


def prediction_of(world: World, supports: Supports, *, stored: int | None = None) -> Prediction:
    """Of 48 tokens in the token blocks 1, 2 and 3."""
    return Prediction(
        world.drift,
        "a",
        tokens=48,
        prompt_tokens=60,
        supports=supports,
        model="m",
        matched=[1, 2, 3],
        token_block=16,
        stores=stored,
        dropped=0,
        explains=lambda predicted, cached: False,
    ).open()


@pytest.mark.parametrize(
    ("removed", "cached", "result"),
    [
        ([3], 32, "evicted"),
        ([3], 16, "fewer"),
        ([3, 2], 16, "evicted"),
        ([3, 2], 48, "evicted"),
        ([4], 32, "fewer"),
        ([4], 48, "exact"),
        (None, 0, "evicted"),
        (None, 64, "more"),
    ],
)
def test_a_prediction_is_what_is_left_of_it_when_the_answer_begins(
    removed: list[int] | None, cached: int, result: str
) -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3, 4], None)
    prediction = prediction_of(world, supports)
    if removed is None:
        supports.clear()
    else:
        supports.remove("m", removed)
    prediction.first_byte()
    if result != "fewer":
        supports.clear()  # too late to matter
    prediction.reported(cached)
    prediction.end(computed=True)
    world.settle()
    assert world.count(result) == 1


@pytest.mark.parametrize(
    ("steps", "cached", "result"),
    [
        (["-3", "+3"], 32, "evicted"),  # as it would be if the request found two blocks and stored the third itself
        (["-3", "+3"], 16, "fewer"),
        (["-3", "-2", "+2", "+3"], 16, "evicted"),
        (["-3", "+3", "-3", "-2", "+2", "+3"], 16, "evicted"),
        (["-3", "+3", "-3", "-2", "+2", "+3"], 0, "fewer"),
        (["-2", "-3", "+2", "+3"], 16, "evicted"),
        (["other-3"], 32, "fewer"),
    ],
)
def test_a_block_evicted_meanwhile_is_not_there_to_be_found_even_if_it_comes_back(
    steps: list[str], cached: int, result: str
) -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3], None)
    supports.add("other", [1, 2, 3], None)
    prediction = prediction_of(world, supports)
    for step in steps:
        block = int(step[-1])
        if step.startswith("+"):
            supports.add("m", [block], block - 1)
        else:
            supports.remove("other" if step.startswith("other") else "m", [block])
    prediction.first_byte()
    prediction.reported(cached)
    prediction.end(computed=True)
    world.settle()
    assert world.count(result) == 1
    assert not supports.watched


def test_a_request_that_stores_again_what_was_evicted_under_it_is_no_drift() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3], None)
    for _ in range(3 * RUN):
        prediction = prediction_of(world, supports)
        supports.remove("m", [2, 3])
        supports.add("m", [2, 3], 1)
        prediction.first_byte()
        prediction.reported(16)
        prediction.end(computed=True)
        world.settle()
    assert (world.resyncs, world.drift.reuse("a")) == ([], 1.0)


def test_an_eviction_whose_event_comes_after_the_answer_is_no_drift() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3], None)
    for _ in range(3 * RUN):
        prediction = prediction_of(world, supports)
        prediction.first_byte()
        prediction.reported(16)
        prediction.end(computed=True)
        supports.remove("m", [2, 3])
        supports.add("m", [2, 3], 1)
        world.settle()
    assert (world.count("evicted"), world.count("fewer")) == (3 * RUN, 0)
    assert (world.resyncs, world.drift.reuse("a"), supports.watched) == ([], 1.0, 0)


def test_what_was_evicted_before_the_request_was_sent_is_not_predicted() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2], None)
    prediction = prediction_of(world, supports)
    prediction.first_byte()
    prediction.reported(32)
    assert world.count("evicted") == 1


def test_reports_are_judged_in_the_order_in_which_they_came() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3], None)
    for cached in (16, 48, 16, 16):
        prediction = prediction_of(world, supports)
        prediction.first_byte()
        prediction.reported(cached)
        prediction.end(computed=True)
    assert world.count("exact") == world.count("fewer") == 0
    world.settle()
    assert (world.count("exact"), world.count("fewer")) == (1, 3)
    assert world.resyncs == []  # never three in a row


def test_reports_that_wait_are_bounded_and_end_with_the_endpoint() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3], None)
    for _ in range(300):
        prediction = prediction_of(world, supports)
        prediction.first_byte()
        prediction.reported(48)
        prediction.end(computed=True)
    for _ in range(300):
        prediction = prediction_of(world, supports)
        prediction.first_byte()
        prediction.reported(16)
        prediction.end(computed=True)
    assert world.count("fewer") == 300 - 256
    world.drift.forget("a")
    assert supports.watched == 0


def test_answers_scale_what_is_predicted_and_the_share_recovers() -> None:
    world = World()
    assert world.drift.reuse("a") == 1.0
    world.report(64, 64, 80, 64)
    assert world.drift.reuse("a") == 1.0
    world.report(*[32] * 30)
    assert world.drift.reuse("a") == pytest.approx(0.5, abs=0.01)
    assert world.drift.reuse("b") == 1.0
    world.report(*[64] * 20)
    assert world.drift.reuse("a") == 1.0
    world.drift.forget("a")
    assert world.drift.reuse("a") == 1.0


def test_an_engine_that_reuses_less_again_and_again_gets_a_limit_and_is_left_alone() -> None:
    world = World()
    with capture_logs() as logs:
        for _ in range(40):
            world.report(32)
            world.now += 60.0
    assert world.resyncs == [("a", True), ("a", False)]
    assert set(world.limits) == {("a", True)}
    assert not world.drift.doubts("a")
    assert [log["event"] for log in logs].count("kv_reuse_short") == 1
    world.report(*[64] * 12)
    assert world.limits[-1] == ("a", False)
    world.now += 60.0
    world.report(*[32] * RUN)
    assert world.resyncs[2:] == [("a", True)]  # it may be a fault this time


def test_what_is_partly_reused_is_not_doubted_but_discounted() -> None:
    world = World()
    world.report(*[32] * 10)
    assert not world.drift.doubts("a")
    assert world.drift.reuses_less("a")
    assert not world.drift.reuses_less("b")


def test_answers_of_endpoints_that_others_follow_scale_predictions_only() -> None:
    world = World()
    for cached in (None, *[32] * 20, *[None] * 20):
        world.drift.observed("a", predicted=64, cached=cached)
    assert world.drift.reuse("a") < 0.2
    assert (world.resyncs, world.drift.doubts("a"), world.drift.reuses_less("a")) == ([], False, True)


def test_counters_scale_predictions_where_answers_report_nothing() -> None:
    world, total = World(), 1000
    world.drift.measured("a", Lookups(total, None), began_at=0.0)
    for _ in range(20):
        total = window(world, predicted=64, grown=48, total=total)
    assert world.drift.reuse("a") == pytest.approx(0.75, abs=0.02)


def test_an_engine_that_reuses_less_now_and_then_gets_a_limit_too() -> None:
    world = World()
    world.report(*[32, 64] * 12)
    assert world.resyncs == []
    assert world.limits[-1] == ("a", True)


def test_where_nothing_is_reused_at_all_the_index_is_healed_again_and_again() -> None:
    world = World()
    for _ in range(40):
        world.report(0)
        world.now += 60.0
    assert len(world.resyncs) > 3


def test_nothing_is_watched_for_requests_that_are_over() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3], None)
    predictions = [prediction_of(world, supports) for _ in range(3)]
    predictions[0].first_byte()
    for prediction in predictions:
        prediction.end(computed=False)
        prediction.end(computed=False)
    assert not supports._watches  # noqa: SLF001 - nothing stays of a request


def test_a_feed_that_never_reports_what_requests_stored_is_doubted_until_it_does() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3], None)
    with capture_logs() as logs:
        for _ in range(RUN):
            assert not world.drift.doubts("a")
            prediction_of(world, supports, stored=4).end(computed=True)
            prediction_of(world, supports, stored=5).end(computed=True)  # one at a time is looked after
            world.now += STORED_WITHIN_SECONDS
        assert world.drift.doubts("a")
    assert logs == [{"event": "kv_events_missed", "log_level": "warning", "endpoint": "a"}]
    prediction_of(world, supports, stored=4).end(computed=False)
    prediction_of(world, supports).end(computed=True)
    world.now += STORED_WITHIN_SECONDS
    assert world.drift.doubts("a")
    prediction_of(world, supports, stored=4).end(computed=True)
    supports.add("m", [4], 3)
    world.now += STORED_WITHIN_SECONDS
    assert not world.drift.doubts("a")


def windows(world: World, result: str) -> float:
    value = world.metrics.registry.get_sample_value("matrixinfer_drift_windows_total", {"pod": "a", "result": result})
    return value or 0


def window(world: World, *, predicted: int, grown: int, total: int) -> int:
    """A reading, a request and its answer, and the next reading; returns the engine's count."""
    world.drift.began("a", sent_at=world.now, least=predicted, tokens=100)
    world.now += WINDOW_SECONDS
    world.drift.measured("a", Lookups(total + grown, None), began_at=world.now)
    return total + grown


def test_what_the_engine_counts_itself_must_cover_what_was_predicted() -> None:
    world, total = World(), 1000
    world.drift.measured("a", Lookups(total, None), began_at=0.0)
    for predicted, grown in ((64, 64), (64, 640), (0, 0)):
        total = window(world, predicted=predicted, grown=grown, total=total)
    assert (windows(world, "covered"), windows(world, "short")) == (2, 0)
    for _ in range(RUN):
        assert world.resyncs == []
        total = window(world, predicted=64, grown=48, total=total)
    assert (windows(world, "short"), world.resyncs) == (RUN, [("a", True)])


def test_only_what_was_sent_and_answered_between_two_readings_is_counted() -> None:
    world = World()
    world.drift.began("a", sent_at=-1.0, least=64, tokens=100)  # nothing has been read yet
    world.now = 1.0
    world.drift.measured("a", Lookups(0, None), began_at=0.5)
    world.drift.began("a", sent_at=0.9, least=64, tokens=100)  # sent before the reading was over
    world.now = 3.0
    world.drift.measured("a", Lookups(0, None), began_at=3.0)  # too soon to mean anything
    world.now = 7.0
    world.drift.began("a", sent_at=6.0, least=64, tokens=100)  # answered after the next reading had begun
    world.drift.measured("a", Lookups(0, None), began_at=6.9)
    assert windows(world, "covered") == windows(world, "short") == 0
    world.drift.began("a", sent_at=7.0, least=64, tokens=100)
    world.now = 20.0
    world.drift.measured("a", Lookups(0, None), began_at=20.0)
    assert windows(world, "short") == 1


@pytest.mark.parametrize(
    ("hits", "queries", "result"),
    [(64, 100, "covered"), (48, 100, "short"), (48, 99, "uncounted"), (64, 99, "uncounted"), (48, 5000, "short")],
)
def test_prompts_that_the_engine_has_not_counted_yet_prove_nothing(hits: int, queries: int, result: str) -> None:
    world = World()
    world.drift.measured("a", Lookups(1000, 3000), began_at=0.0)
    for turn in range(1, RUN + 1):
        world.drift.began("a", sent_at=world.now, least=64, tokens=100)
        world.now += WINDOW_SECONDS
        world.drift.measured("a", Lookups(1000 + turn * hits, 3000 + turn * queries), began_at=world.now)
    assert windows(world, result) == RUN
    assert bool(world.resyncs) == (result == "short")


def test_an_engine_that_counts_from_the_beginning_again_says_nothing_of_what_was_before() -> None:
    world = World()
    world.drift.measured("a", Lookups(500, None), began_at=0.0)
    assert window(world, predicted=64, grown=-400, total=500) == 100
    assert windows(world, "short") == 0
    window(world, predicted=64, grown=64, total=100)
    assert windows(world, "covered") == 1


def test_where_answers_report_hits_the_counters_are_only_shown() -> None:
    world = World()
    world.report(64)
    total = 0
    world.drift.measured("a", Lookups(total, None), began_at=0.0)
    for _ in range(2 * RUN):
        total = window(world, predicted=64, grown=0, total=total)
    assert (windows(world, "short"), world.resyncs) == (2 * RUN, [])


def test_a_prediction_is_part_of_the_window_that_its_request_falls_into() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2, 3], None)
    world.drift.measured("a", Lookups(0, None), began_at=0.0)
    prediction = prediction_of(world, supports)
    supports.remove("m", [3])
    prediction.first_byte()
    world.now = WINDOW_SECONDS
    world.drift.measured("a", Lookups(32, None), began_at=world.now)
    assert windows(world, "covered") == 1
