"""An index that writes to two others: this process reads its own memory, and other processes read Redis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from matrixinfer.index.base import BlockIndex, IndexStats


class TeeIndex:
    """A `BlockIndex` that reads from `read` and writes to both `read` and `other`."""

    def __init__(self, read: BlockIndex, other: BlockIndex) -> None:
        self._read = read
        self._other = other

    @property
    def prefix_closed(self) -> bool:
        return self._read.prefix_closed

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        self._read.add(model, pod, hashes, parent)
        self._other.add(model, pod, hashes, parent)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        removed = list(hashes)
        self._read.remove(model, pod, removed)
        self._other.remove(model, pod, removed)

    def clear(self, pod: str) -> None:
        self._read.clear(pod)
        self._other.clear(pod)

    def forget(self, pod: str) -> None:
        self._read.forget(pod)
        self._other.forget(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        return await self._read.match(model, hashes)

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> Mapping[str, int]:
        return await self._read.last(model, pods, hashes)

    async def flush(self) -> None:
        await self._read.flush()
        await self._other.flush()

    def stats(self) -> IndexStats:
        """The counters of the index that is read."""
        return self._read.stats()
