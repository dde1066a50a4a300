"""An index that starts with blocks from elsewhere, such as Redis, until each pod's own events have reported more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.index.base import BlockIndex, IndexStats
from matrixinfer.index.memory import MemoryIndex


class WarmIndex:
    """A `BlockIndex` around another one. Blocks added by `warm` count for a pod until `has_own_events(pod)` is true.

    So do reusable ends, whose name stands for the same pod. `max_blocks` bounds the blocks added by `warm`.
    """

    def __init__(self, index: BlockIndex, *, max_blocks: int, has_own_events: Callable[[str], bool]) -> None:
        self._index = index
        self._warm = MemoryIndex(max_blocks=max_blocks, prefix_closed=False)
        self._pods: set[str] = set()
        self._has_own_events = has_own_events

    @property
    def prefix_closed(self) -> bool:
        """As in the inner index."""
        return self._index.prefix_closed

    def warm(self, model: str, pod: str, hashes: Sequence[int]) -> None:
        """Add blocks that `pod` is said to hold, in any order. Ignored if the pod has own events."""
        if not self._has_own_events(pod.removesuffix(ENDS_SUFFIX)):
            self._pods.add(pod)
            self._warm.add(model, pod, hashes, None)

    def is_warming(self, pod: str) -> bool:
        """Whether blocks from `warm` still count for a pod."""
        if pod in self._pods and self._has_own_events(pod.removesuffix(ENDS_SUFFIX)):
            self._cool(pod)
        return pod in self._pods

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """Add blocks that the pod's own events report."""
        self._index.add(model, pod, hashes, parent)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """Remove blocks as the pod's own events report, also those added by `warm`."""
        removed = list(hashes)
        self._index.remove(model, pod, removed)
        if pod in self._pods:
            self._warm.remove(model, pod, removed)

    def clear(self, pod: str) -> None:
        """Clear the inner index only: a feed that starts again does not refute the blocks added by `warm`."""
        self._index.clear(pod)

    def forget(self, pod: str) -> None:
        """Forget the pod in the inner index, and its blocks from `warm`."""
        self._index.forget(pod)
        self._cool(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        """Number of consecutive blocks per pod. For a pod without own events, the larger match counts."""
        found = await self._index.match(model, hashes)
        if not self._pods:
            return found
        counts = dict(found)
        for pod, held in self._warm.count(model, hashes).items():
            if self.is_warming(pod):
                counts[pod] = max(held, counts.get(pod, 0))
        return counts

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> Mapping[str, int]:
        """The last block that each pod holds, by its own events or by `warm`."""
        found = await self._index.last(model, pods, hashes)
        warming = [pod for pod in pods if self.is_warming(pod)]
        if not warming:
            return found
        places = dict(found)
        for pod, position in self._warm.last_of(model, warming, hashes).items():
            places[pod] = max(position, places.get(pod, 0))
        return places

    async def flush(self) -> None:
        """Flush the inner index."""
        await self._index.flush()

    def stats(self) -> IndexStats:
        """Pods and blocks of the inner index; evictions and memory of both."""
        own, warm = self._index.stats(), self._warm.stats()
        return IndexStats(
            blocks=own.blocks,
            pods=own.pods,
            evicted=own.evicted + warm.evicted,
            memory_bytes=own.memory_bytes + warm.memory_bytes,
        )

    def _cool(self, pod: str) -> None:
        self._pods.discard(pod)
        self._warm.forget(pod)
