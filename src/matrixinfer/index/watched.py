"""An index that says what is written to it: what engines store, and when they lose everything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from matrixinfer.index.base import BlockIndex, IndexStats

_PART = "~"
"""In the names of an endpoint's slower tiers and reusable ends."""


class Watch(Protocol):
    """Sees the blocks of endpoints, without the names of their tiers and reusable ends."""

    def stored(self, model: str, endpoint: str, hashes: Sequence[int]) -> None: ...

    def emptied(self, endpoint: str) -> None: ...

    def forget(self, endpoint: str) -> None: ...


class WatchedIndex:
    """A `BlockIndex` that passes everything on to `index`, and tells `watch` what endpoints store and lose."""

    def __init__(self, index: BlockIndex, watch: Watch) -> None:
        self._index = index
        self._watch = watch

    @property
    def prefix_closed(self) -> bool:
        return self._index.prefix_closed

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        self._index.add(model, pod, hashes, parent)
        if _PART not in pod:
            self._watch.stored(model, pod, hashes)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        self._index.remove(model, pod, hashes)

    def clear(self, pod: str) -> None:
        self._index.clear(pod)
        if _PART not in pod:
            self._watch.emptied(pod)

    def forget(self, pod: str) -> None:
        self._index.forget(pod)
        if _PART not in pod:
            self._watch.forget(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        return await self._index.match(model, hashes)

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> Mapping[str, int]:
        return await self._index.last(model, pods, hashes)

    async def flush(self) -> None:
        await self._index.flush()

    def stats(self) -> IndexStats:
        """The counters of the index."""
        return self._index.stats()
