"""Metrics of the ladder: what became of the prompt tokens of the requests that have ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.traffic.ladder.record import LadderLog
from matrixinfer.traffic.ladder.rungs import RungName
from matrixinfer.traffic.ladder.tally import LOST


class LadderCollector(Collector):
    """Tokens by rung and by cause. They rise once a minute."""

    def __init__(self, ladder: LadderLog) -> None:
        self._ladder = ladder

    def collect(self) -> Iterator[Metric]:
        """Read the counts now."""
        counts = self._ladder.counters()
        kept = CounterMetricFamily(
            "matrixinfer_ladder_tokens", "Prompt tokens, and what was left of them on each rung.", labels=["rung"]
        )
        for rung in ("prompt", *get_args(RungName)):
            if rung != "reported":
                kept.add_metric([rung], counts.get(rung, 0.0))
        reported = CounterMetricFamily(
            "matrixinfer_ladder_reported_tokens",
            "Of the requests whose answers report cached tokens: prompt tokens, the predicted and the reported hit.",
            labels=["kind"],
        )
        for kind, name in (
            ("prompt", "reported_prompt"),
            ("predicted", "reported_predicted"),
            ("reported", "reported"),
        ):
            reported.add_metric([kind], counts.get(name, 0.0))
        lost = CounterMetricFamily(
            "matrixinfer_ladder_lost_tokens", "Prompt tokens that were computed, by why.", labels=["cause"]
        )
        for name, tokens in counts.items():
            if name.startswith(LOST):
                lost.add_metric([name.removeprefix(LOST)], tokens)
        yield from (kept, reported, lost)
