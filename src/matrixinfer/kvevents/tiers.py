"""The tiers of an engine's cache: the device's memory, the host's memory, and storage.

The index holds an endpoint's blocks on all tiers under the endpoint's name. Once events report a slower tier, the index
also holds the blocks up to each faster tier under names of their own, so that a lookup shows how much of a match must be
loaded, and from where.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

from matrixinfer.config.endpoint_names import TIERS, EndpointName
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.supports import Supports
from matrixinfer.traffic.history import RoutingHistory

DEVICE, HOST, STORAGE = 0, 1, 2
MOST_UNEVICTED_TOKENS = 2_000_000
"""The most tokens to believe in on a tier that publishes no evictions: some 250 GB for a model of 8 billion parameters."""
MAX_PLACES = 16
"""Media and attention groups of one engine that are kept apart; more are not believed."""
Place: TypeAlias = tuple[str, int]
"""A cache medium and an attention group."""
Supported = tuple[str, list[int], int | None]
"""Consecutive token blocks that an engine block supports: their model, their names, and the one before them."""


@lru_cache(maxsize=64)
def tier_of(medium: str) -> int:
    """The tier of a cache medium, by the name that engines give it."""
    name = medium.upper()
    if name in ("GPU", "DEVICE", "HBM", "XPU", "TPU", "NPU"):
        return DEVICE
    return HOST if name.startswith(("CPU", "HOST", "DRAM")) else STORAGE


def index_names(endpoint: str) -> Iterator[str]:
    """Every name under which the index may hold blocks of an endpoint."""
    yield endpoint
    yield from map(EndpointName.parse(endpoint).up_to, TIERS)
    yield EndpointName.parse(endpoint).ends


class Tiers:
    """Keeps the supports of one endpoint: over all its tiers and, if it has several, up to each faster one."""

    def __init__(self, pod: str, index: BlockIndex, history: RoutingHistory | None = None) -> None:
        self._name = EndpointName.parse(pod)
        self._index = index
        self.all = Supports(pod, index, history)
        self._seen = {DEVICE}
        self._up_to: dict[int, Supports] = {}

    @property
    def names(self) -> Sequence[str]:
        """The index's names for the blocks up to each faster tier, the fastest first; empty while there is one tier."""
        return [self._name.up_to(TIERS[tier]) for tier in sorted(self._up_to)] if self._up_to else []

    def open(self, tier: int, present: Callable[[int], Iterable[Supported]]) -> None:
        """Prepare for blocks on `tier`. `present` gives what the blocks on tiers up to a number support already."""
        if tier in self._seen:
            return
        self._seen.add(tier)
        for faster in sorted(self._seen)[:-1]:
            if faster not in self._up_to:
                self._up_to[faster] = supports = Supports(self._name.up_to(TIERS[faster]), self._index)
                for model, names, parent in present(faster):
                    supports.add(model, names, parent)

    def add(self, tier: int, model: str, names: Sequence[int], parent: int | None) -> None:
        """`Supports.add`, for blocks on `tier`."""
        self.all.add(model, names, parent)
        for faster, supports in self._up_to.items():
            if tier <= faster:
                supports.add(model, names, parent)

    def remove(self, tier: int, model: str, names: Sequence[int]) -> None:
        """`Supports.remove`, for blocks on `tier`."""
        self.all.remove(model, names)
        for faster, supports in self._up_to.items():
            if tier <= faster:
                supports.remove(model, names)

    def flush(self) -> None:
        """Remove from the index what has lost its last support."""
        self.all.flush()
        for supports in self._up_to.values():
            supports.flush()

    def clear(self) -> None:
        """Drop every support."""
        self.all.clear()
        for supports in self._up_to.values():
            supports.clear()

    def reset(self) -> None:
        """Clear, and forget which tiers there are."""
        self.clear()
        for supports in self._up_to.values():
            supports.forget()
        self._seen = {DEVICE}
        self._up_to.clear()


class Unevicted:
    """Blocks of slower tiers that have published no eviction so far, per tier, those stored last at the end.

    Connectors such as LMCache never publish evictions, so that blocks would add up for ever.
    """

    def __init__(self, most_tokens: int = MOST_UNEVICTED_TOKENS) -> None:
        self._most = most_tokens
        self._blocks: dict[Hashable, dict[int, int]] = {}
        self._tokens: dict[Hashable, int] = {}
        self._evicts: set[Hashable] = set()

    def __len__(self) -> int:
        """How many blocks are remembered."""
        return sum(map(len, self._blocks.values()))

    def stored(self, place: Hashable, blocks: Iterable[int], size: int) -> list[int]:
        """`place` stored blocks of `size` tokens. Returns the oldest, where there are too many: forget them."""
        if place in self._evicts:
            return []
        held = self._blocks.setdefault(place, {})
        for block in blocks:
            self._tokens[place] = self._tokens.get(place, 0) + size - held.pop(block, 0)
            held[block] = size
        gone: list[int] = []
        if self._tokens[place] > self._most:
            for block in held:
                if self._tokens[place] <= self._most * 15 // 16:
                    break
                self._tokens[place] -= held[block]
                gone.append(block)
            for block in gone:
                del held[block]
        return gone

    @property
    def silent(self) -> Collection[Hashable]:
        """The places that hold blocks and have published no eviction."""
        return self._blocks.keys()

    def evicts(self, place: Hashable) -> bool:
        """`place` published an eviction, so nothing need be forgotten. Returns whether that is new."""
        if place in self._evicts:
            return False
        self._evicts.add(place)
        self._blocks.pop(place, None)
        self._tokens.pop(place, None)
        return True

    def clear(self) -> None:
        """Nothing is held any more."""
        self._blocks.clear()
        self._tokens.clear()

    def reset(self) -> None:
        """Expect another engine."""
        self.clear()
        self._evicts.clear()
