"""Metrics of the block index in Redis, read from its parts at every scrape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.index.redis.circuit import State
from matrixinfer.index.redis.index import RedisIndex
from matrixinfer.index.redis.pod_states import PodStates


class RedisCollector(Collector):
    """Lookups, writes, and models whose blocks are hashed differently."""

    def __init__(self, index: RedisIndex, states: PodStates | None) -> None:
        self._index = index
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        reader, writer = self._index.reader, self._index.writer
        lookups = CounterMetricFamily("matrixinfer_redis_lookups", "Lookups, by outcome.", labels=["outcome"])
        for outcome, count in reader.stats.outcomes.items():
            lookups.add_metric([outcome], count)
        circuit = GaugeMetricFamily(
            "matrixinfer_redis_circuit", "1 for the current state of the lookups' circuit breaker.", labels=["state"]
        )
        for state in get_args(State):
            circuit.add_metric([state], float(reader.circuit == state))
        writes = CounterMetricFamily("matrixinfer_redis_writes", "Writes, by kind, and failures.", labels=["kind"])
        for kind, count in asdict(writer.stats).items():
            writes.add_metric([kind], count)
        held = GaugeMetricFamily(
            "matrixinfer_redis_writer", "1 if this process is the writer of the endpoint.", labels=["pod"]
        )
        for pod in writer.pods:
            held.add_metric([pod], float(writer.is_writer(pod)))
        yield from (lookups, circuit, writes, held)
        yield CounterMetricFamily(
            "matrixinfer_redis_lookup_seconds", "Time spent in lookups.", value=reader.stats.seconds
        )
        yield GaugeMetricFamily(
            "matrixinfer_redis_waiting_blocks", "Blocks waiting to be written.", value=writer.waiting
        )
        if self._index.watch is not None:
            unmatched = GaugeMetricFamily(
                "matrixinfer_redis_lookups_unmatched",
                "1 for models (by their name in Redis) whose lookups never match, though others should write for them.",
                labels=["model"],
            )
            for model in self._index.watch.problems:
                unmatched.add_metric([model], 1)
            yield unmatched
        if self._states is not None:
            foreign = GaugeMetricFamily(
                "matrixinfer_redis_scheme_differs",
                "1 for models whose blocks in Redis are hashed differently, so never match.",
                labels=["model"],
            )
            for model in self._states.foreign:
                foreign.add_metric([model], 1)
            yield foreign
