"""What the metrics of several processes become together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from matrixinfer.telemetry.merged import LEAST, SUMMED, Families, counted, merged, parsed, rendered

SOURCE = Path(__file__).parents[3] / "src" / "matrixinfer"
LARGEST = frozenset(
    "matrixinfer_" + name
    for name in (
        "config_applied_timestamp_seconds",
        "discovered_pods",
        "discovery_failing",
        "ejected",
        "index_blocks",
        "kv_engine_blocks",
        "kv_feed_limits",
        "kv_feed_state",
        "kv_lag_seconds",
        "kv_last_frame_timestamp_seconds",
        "kv_trust",
        "limits_degraded",
        "loop_pause_seconds",
        "peers",
        "pod_asleep",
        "redis_circuit",
        "redis_lookups_unmatched",
        "redis_scheme_differs",
        "tokenizer_approximate",
        "tokenizer_source",
        "workers",
    )
)
"""Gauges of which the largest value is shown. Whoever adds a gauge decides here, or in `SUMMED` or `LEAST`."""


class Process:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("matrixinfer_requests", "Requests.", ["pod"], registry=self.registry)
        self.seconds = Histogram("matrixinfer_seconds", "Time.", buckets=(1, 2), registry=self.registry)
        self.in_flight = Gauge("matrixinfer_in_flight", "Now.", ["pod"], registry=self.registry)
        self.trust = Gauge("matrixinfer_kv_trust", "Trust.", ["pod"], registry=self.registry)
        self.generation = Gauge("matrixinfer_config_generation", "Number.", registry=self.registry)

    def families(self) -> Families:
        return parsed(generate_latest(self.registry).decode())


def value(families: Families, series: str) -> float:
    line = next(each for each in rendered(families).decode().splitlines() if each.startswith(f"{series} "))
    return float(line.split()[-1])


@pytest.fixture
def two() -> tuple[Process, Process]:
    one, other = Process(), Process()
    for process, count in ((one, 3), (other, 4)):
        process.requests.labels("a").inc(count)
        process.seconds.observe(count - 2.5)
        process.in_flight.labels("a").set(count)
        process.trust.labels("a").set(1)
        process.generation.set(count)
    return one, other


def test_counts_are_added_and_flags_are_not(two: tuple[Process, Process]) -> None:
    families = merged([each.families() for each in two])
    assert value(families, 'matrixinfer_requests_total{pod="a"}') == 7
    assert value(families, 'matrixinfer_in_flight{pod="a"}') == 7
    assert value(families, 'matrixinfer_kv_trust{pod="a"}') == 1
    assert value(families, "matrixinfer_config_generation") == 3
    assert value(families, "matrixinfer_seconds_count") == 2
    assert value(families, 'matrixinfer_seconds_bucket{le="1.0"}') == 1
    assert value(families, 'matrixinfer_seconds_bucket{le="+Inf"}') == 2
    assert value(families, "matrixinfer_seconds_sum") == 2.0


def test_what_a_process_counted_stays_when_it_has_gone(two: tuple[Process, Process]) -> None:
    one, other = two
    gone = dict(counted(one.families()))
    families = merged([other.families()], gone)
    assert value(families, 'matrixinfer_requests_total{pod="a"}') == 7
    assert value(families, "matrixinfer_seconds_count") == 2
    assert value(families, 'matrixinfer_in_flight{pod="a"}') == 4


def test_series_of_pods_that_nobody_has_any_more_do_not_come_back(two: tuple[Process, Process]) -> None:
    one, other = two
    one.requests.labels("left").inc()
    text = rendered(merged([other.families()], dict(counted(one.families())))).decode()
    assert "left" not in text


def test_what_is_rendered_is_what_a_single_process_would_say(two: tuple[Process, Process]) -> None:
    one = two[0]
    one.requests.labels('b"\\\n').inc()
    families = one.families()
    assert parsed(rendered(merged([families])).decode()) == families


def test_of_no_process_there_is_nothing() -> None:
    assert merged([], {("matrixinfer_requests_total", ()): 3.0}) == {}


def test_every_gauge_is_merged_in_a_way_that_somebody_has_chosen() -> None:
    source = "".join(file.read_text() for file in SOURCE.rglob("*.py"))
    gauges = set(re.findall(r'Gauge(?:MetricFamily)?\(\s*"(matrixinfer_[a-z_]+)"', source))
    chosen = SUMMED | LEAST | LARGEST
    assert gauges - chosen == set()
    assert chosen - gauges == set()
