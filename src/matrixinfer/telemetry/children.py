"""The children of a metric, by their label values."""

from __future__ import annotations

from typing import Generic, TypeVar

from prometheus_client import Counter, Gauge, Histogram

M = TypeVar("M", Counter, Gauge, Histogram)


class Children(dict[tuple[str, ...], M], Generic[M]):
    """A metric's children by label values. They are kept here because `labels()` costs more than an observation."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric: M = metric

    def __missing__(self, labels: tuple[str, ...]) -> M:
        child = self[labels] = self._metric.labels(*labels)
        return child

    def forget(self, first: str) -> None:
        """Drop the children whose first label is `first`."""
        for labels in [labels for labels in self if labels[0] == first]:
            del self[labels]
            self._metric.remove(*labels)
