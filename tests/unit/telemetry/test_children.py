"""The children are shown as prometheus-client shows its own."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from matrixinfer.telemetry.children import Children, Count, Level, Times

BOUNDS = (0.0001, 0.25, 0.5, 1, 640)
seconds = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 1000), st.just(1e9))
labels = st.sampled_from(["a", 'quoted "b"', "line\nend", "ü"])


def shown(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.tuples(labels, seconds)))
def test_values_are_shown_as_the_library_shows_its_own(values: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts = Children(ours, "counts", "Counted.", ["x"], Count)
    levels = Children(ours, "levels", "Set.", ["x", "y"], Level)
    times = Children(ours, "times", "Took.", ["x"], partial(Times, BOUNDS))
    counter = Counter("matrixinfer_counts", "Counted.", ["x"], registry=theirs)
    gauge = Gauge("matrixinfer_levels", "Set.", ["x", "y"], registry=theirs)
    histogram = Histogram("matrixinfer_times", "Took.", ["x"], buckets=BOUNDS, registry=theirs)
    for label, value in values:
        counts[label,].inc(value)
        levels[label, "1"].set(value)
        times[label,].observe(value)
        counter.labels(label).inc(value)
        gauge.labels(label, "1").set(value)
        histogram.labels(label).observe(value)
    assert shown(ours) == shown(theirs)


def test_one_without_labels_is_shown_before_it_is_used() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    Children(ours, "counts", "Counted.", [], Count)
    Children(ours, "levels", "Set.", [], Level)
    Children(ours, "times", "Took.", [], partial(Times, BOUNDS))
    Counter("matrixinfer_counts", "Counted.", registry=theirs)
    Gauge("matrixinfer_levels", "Set.", registry=theirs)
    Histogram("matrixinfer_times", "Took.", buckets=BOUNDS, registry=theirs)
    assert shown(ours) == shown(theirs)


def test_a_level_counts_open_contexts_and_one_that_was_forgotten_is_not_shown_again() -> None:
    registry = CollectorRegistry()
    levels = Children(registry, "levels", "Set.", ["x"], Level)
    with levels["a",], levels["a",], levels["b",]:
        assert 'matrixinfer_levels{x="a"} 2.0' in shown(registry)
        levels.forget("a")
    assert shown(registry)[2:] == ['matrixinfer_levels{x="b"} 0.0']
