"""Metrics about the workers themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.app.workers.process import WorkerProcess


class WorkerCollector(Collector):
    """How many workers there are, and how often one had to be replaced."""

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """Read the states now."""
        running = sum(each.is_ready.is_set() for each in self._workers)
        yield GaugeMetricFamily("matrixinfer_workers", "Workers that serve.", value=running)
        died = CounterMetricFamily("matrixinfer_worker_deaths", "Times that a worker died.", labels=["worker"])
        for each in self._workers:
            died.add_metric([str(each.number)], each.restarts)
        yield died
