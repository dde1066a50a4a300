"""Two indexes written alike, of which one is read: this process looks up in its own memory, others in Redis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matrixinfer.index.base import BlockIndex, IndexStats


class TeeIndex:
    """A `BlockIndex` that is `read`, and whose writes go to `other` as well."""

    def __init__(self, read: BlockIndex, other: BlockIndex) -> None:
        self._read = read
        self._other = other

    @property
    def prefix_closed(self) -> bool:
        """As the one that is read."""
        return self._read.prefix_closed

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """To both."""
        self._read.add(model, pod, hashes, parent)
        self._other.add(model, pod, hashes, parent)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """From both."""
        gone = list(hashes)
        self._read.remove(model, pod, gone)
        self._other.remove(model, pod, gone)

    def clear(self, pod: str) -> None:
        """Both."""
        self._read.clear(pod)
        self._other.clear(pod)

    def forget(self, pod: str) -> None:
        """Both."""
        self._read.forget(pod)
        self._other.forget(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        """As the one that is read."""
        return await self._read.match(model, hashes)

    async def flush(self) -> None:
        """Both."""
        await self._read.flush()
        await self._other.flush()

    def stats(self) -> IndexStats:
        """Of the one that is read."""
        return self._read.stats()
