"""The children of a metric: one per combination of label values.

prometheus-client keeps the registry and writes the exposition. Its own children serve threads: each value takes a lock and
several checks, and a request changes twenty values. These belong to the event loop's thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from math import inf
from types import TracebackType
from typing import ClassVar, Generic, Protocol, TypeAlias, TypeVar

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

Sample: TypeAlias = tuple[str, dict[str, str], float]
"""What is added to the name of the metric, further labels, and the value."""


class Child(Protocol):
    """What a metric counts under one combination of label values."""

    kind: ClassVar[str]

    def samples(self) -> Iterator[Sample]:
        """What is shown of it."""


C = TypeVar("C", bound=Child)


class Count:
    """Only grows."""

    kind: ClassVar[str] = "counter"
    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Grow by `amount`, which is not negative."""
        self._value += amount

    def samples(self) -> Iterator[Sample]:
        """Its value."""
        yield "_total", {}, self._value


class Level:
    """Is set, or counts how many contexts of it are open."""

    kind: ClassVar[str] = "gauge"
    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value = 0.0

    def set(self, value: float) -> None:
        """Show this from now on."""
        self._value = float(value)

    def __enter__(self) -> None:
        self._value += 1

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._value -= 1

    def samples(self) -> Iterator[Sample]:
        """Its value."""
        yield "", {}, self._value


class Times:
    """A histogram of seconds with these upper bounds, in rising order."""

    kind: ClassVar[str] = "histogram"
    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Something took so long."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def samples(self) -> Iterator[Sample]:
        """Its buckets, each with what is in those below, too, and what all took."""
        total = 0.0
        for bound, count in zip((*self._bounds, inf), self._counts, strict=True):
            total += count
            yield "_bucket", {"le": "+Inf" if bound == inf else str(float(bound))}, total
        yield "_count", {}, total
        yield "_sum", {}, self._sum


class Children(dict[tuple[str, ...], C], Generic[C]):
    """A metric's children by label values. `new` makes one that is asked for first; one without labels is made at once."""

    def __init__(
        self, registry: CollectorRegistry, name: str, text: str, labels: Sequence[str], new: Callable[[], C]
    ) -> None:
        super().__init__()
        self._new = new
        if not labels:
            self[()] = new()
        registry.register(_Shown(f"matrixinfer_{name}", text, labels, new().kind, self))

    def __missing__(self, labels: tuple[str, ...]) -> C:
        child = self[labels] = self._new()
        return child

    def forget(self, first: str) -> None:
        """Drop the children whose first label is `first`."""
        for labels in [labels for labels in self if labels[0] == first]:
            del self[labels]


class _Shown(Collector, Generic[C]):
    """Shows children as a metric."""

    def __init__(self, name: str, text: str, labels: Sequence[str], kind: str, children: Children[C]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._kind = kind
        self._children = children

    def collect(self) -> Iterator[Metric]:
        """Read the values now."""
        metric = Metric(self._name, self._text, self._kind)
        for values, child in self._children.items():
            labels = dict(zip(self._labels, values, strict=True))
            for suffix, further, value in child.samples():
                metric.add_sample(f"{self._name}{suffix}", labels | further, value)
        yield metric
