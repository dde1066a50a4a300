"""The tiers of an engine's cache: the device's memory, the host's, and what lies beyond.

The index holds an endpoint's blocks of any tier under its name. Once its events tell of a slower tier, it also holds those
that are on the device, or on one of the faster tiers, under names of their own, so that a look-up tells how much of a match
must be loaded from where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from matrixinfer.config.endpoint_names import TIERS, EndpointName
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.supports import Supports
from matrixinfer.traffic.history import RoutingHistory

DEVICE, HOST, STORAGE = 0, 1, 2
Supported = tuple[str, list[int], int | None]
"""Token blocks in a row that one more engine block supports: their model, their names, and the one before them."""


def tier_of(medium: str) -> int:
    """The tier of a cache medium, as engines call it."""
    name = medium.upper()
    if name in ("GPU", "DEVICE", "HBM", "XPU", "TPU", "NPU"):
        return DEVICE
    return HOST if name.startswith(("CPU", "HOST", "DRAM")) else STORAGE


def index_names(endpoint: str) -> Iterator[str]:
    """Every name under which the index may hold blocks of an endpoint."""
    yield endpoint
    yield from map(EndpointName.parse(endpoint).up_to, TIERS)


class Tiers:
    """Keeps the supports of one endpoint: over all its tiers, and up to each faster one where it has several."""

    def __init__(self, pod: str, index: BlockIndex, history: RoutingHistory | None = None) -> None:
        self._name = EndpointName.parse(pod)
        self._index = index
        self.all = Supports(pod, index, history)
        self._seen = {DEVICE}
        self._up_to: dict[int, Supports] = {}

    @property
    def names(self) -> Sequence[str]:
        """The index's names of what is held up to each faster tier, the fastest first; none while there is but one."""
        return [self._name.up_to(TIERS[tier]) for tier in sorted(self._up_to)] if self._up_to else []

    def open(self, tier: int, present: Callable[[int], Iterable[Supported]]) -> None:
        """Blocks of `tier` are about to come. `present` gives what the tiers up to a number support already."""
        if tier in self._seen:
            return
        self._seen.add(tier)
        for faster in sorted(self._seen)[:-1]:
            if faster not in self._up_to:
                self._up_to[faster] = supports = Supports(self._name.up_to(TIERS[faster]), self._index)
                for model, names, parent in present(faster):
                    supports.add(model, names, parent)

    def add(self, tier: int, model: str, names: Sequence[int], parent: int | None) -> None:
        """As `Supports.add`, of blocks on `tier`."""
        self.all.add(model, names, parent)
        for faster, supports in self._up_to.items():
            if tier <= faster:
                supports.add(model, names, parent)

    def remove(self, tier: int, model: str, names: Sequence[int]) -> None:
        """As `Supports.remove`, of blocks on `tier`."""
        self.all.remove(model, names)
        for faster, supports in self._up_to.items():
            if tier <= faster:
                supports.remove(model, names)

    def flush(self) -> None:
        """Tell the index what is gone."""
        self.all.flush()
        for supports in self._up_to.values():
            supports.flush()

    def clear(self) -> None:
        """Nothing is supported any more."""
        self.all.clear()
        for supports in self._up_to.values():
            supports.clear()

    def reset(self) -> None:
        """As `clear`, and nothing is known of the tiers."""
        self.clear()
        for supports in self._up_to.values():
            supports.forget()
        self._seen = {DEVICE}
        self._up_to.clear()
