from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from matrixinfer.drift import RUN, Drift, Prediction
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.supports import Supports
from matrixinfer.telemetry.metrics import Metrics


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.metrics = Metrics()
        self.resyncs: list[tuple[str, bool]] = []
        self.drift = Drift(self.metrics, self._resync, lambda: self.now)

    def _resync(self, name: str, *, replay: bool) -> None:
        self.resyncs.append((name, replay))

    def report(self, *cached: int | None, predicted: int = 64, evicted: bool = False, name: str = "a") -> None:
        for each in cached:
            self.drift.reported(name, predicted=predicted, cached=each, evicted=evicted)

    def count(self, result: str) -> float:
        return self.metrics.registry.get_sample_value("matrixinfer_drift_total", {"pod": "a", "result": result}) or 0


def test_answers_are_counted_by_what_they_say_of_the_prediction() -> None:
    world = World()
    world.report(64, 80, 32)
    world.report(32, evicted=True)
    assert [world.count(result) for result in ("exact", "more", "fewer", "evicted")] == [1, 1, 1, 1]
    value = world.metrics.registry.get_sample_value
    assert value("matrixinfer_reported_hit_tokens_total", {"pod": "a"}) == 208
    assert value("matrixinfer_expected_hit_tokens_total", {"pod": "a"}) == 256


def test_silence_means_none_once_an_engine_has_told() -> None:
    world = World()
    world.report(None, None, None, None)
    assert world.count("fewer") == 0
    world.report(64, None)
    assert (world.count("exact"), world.count("fewer")) == (1, 1)


def test_a_run_of_fewer_has_the_pod_indexed_anew() -> None:
    world = World()
    with capture_logs() as logs:
        world.report(*[32] * (RUN - 1), 64, *[32] * (RUN - 1))
        assert world.resyncs == []
        world.report(32)
    assert world.resyncs == [("a", True)]
    assert logs == [{"event": "kv_events_drift", "log_level": "warning", "pod": "a", "replay": True}]
    assert world.metrics.registry.get_sample_value("matrixinfer_kv_resyncs_total", {"pod": "a"}) == 1


def test_evictions_neither_excuse_nor_accuse() -> None:
    world = World()
    for _ in range(RUN):
        world.report(32)
        world.report(32, evicted=True)
    assert world.resyncs == [("a", True)]


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


@pytest.mark.parametrize(("removed", "result"), [([3], "evicted"), ([4], "fewer"), (None, "evicted")])
def test_a_prediction_is_excused_by_the_loss_of_its_last_block(removed: list[int] | None, result: str) -> None:
    world, index = World(), MemoryIndex()
    supports = Supports("a", index)
    supports.add("m", [1, 2, 3, 4], None)
    prediction = Prediction(world.drift, "a", 48, supports, 3)
    if removed is None:
        supports.clear()
    else:
        supports.remove("m", removed)
    prediction.reported(16)
    prediction.end()
    prediction.end()
    assert world.count(result) == 1


def test_nothing_is_watched_for_requests_that_are_over() -> None:
    world, supports = World(), Supports("a", MemoryIndex())
    supports.add("m", [1, 2], None)
    predictions = [Prediction(world.drift, "a", 16, supports, 2) for _ in range(3)]
    for prediction in predictions:
        prediction.end()
    assert not supports._watches
