"""Metrics of the block index in Redis, read off its parts whenever someone scrapes."""

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
    """Look-ups, writes, and models whose blocks are made otherwise."""

    def __init__(self, index: RedisIndex, states: PodStates | None) -> None:
        self._index = index
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        reader, writer = self._index.reader, self._index.writer
        lookups = CounterMetricFamily(
            "matrixinfer_redis_lookups", "Look-ups, by what came of them.", labels=["outcome"]
        )
        for outcome, count in reader.stats.outcomes.items():
            lookups.add_metric([outcome], count)
        circuit = GaugeMetricFamily(
            "matrixinfer_redis_circuit", "1 for the state of the circuit of look-ups.", labels=["state"]
        )
        for state in get_args(State):
            circuit.add_metric([state], float(reader.circuit == state))
        writes = CounterMetricFamily(
            "matrixinfer_redis_writes", "What the writer did, and what went wrong.", labels=["kind"]
        )
        for kind, count in asdict(writer.stats).items():
            writes.add_metric([kind], count)
        held = GaugeMetricFamily(
            "matrixinfer_redis_writer", "1 where this process is the writer of a pod.", labels=["pod"]
        )
        for pod in writer.pods:
            held.add_metric([pod], float(writer.is_writer(pod)))
        yield from (lookups, circuit, writes, held)
        yield CounterMetricFamily(
            "matrixinfer_redis_lookup_seconds", "Time of all look-ups.", value=reader.stats.seconds
        )
        yield GaugeMetricFamily(
            "matrixinfer_redis_waiting_blocks", "Blocks that wait to be written.", value=writer.waiting
        )
        if self._states is not None:
            foreign = GaugeMetricFamily(
                "matrixinfer_redis_scheme_differs", "1 for models whose blocks in Redis never match.", labels=["model"]
            )
            for model in self._states.foreign:
                foreign.add_metric([model], 1)
            yield foreign
