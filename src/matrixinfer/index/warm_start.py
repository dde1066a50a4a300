"""What an embedded index begins with: what was known of the pods elsewhere, until each pod's own events have told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from matrixinfer.index.base import BlockIndex, IndexStats
from matrixinfer.index.memory import MemoryIndex


class WarmIndex:
    """A `BlockIndex` around another one. Blocks that `warm` brought count for pods of which `is_told` is not true yet."""

    def __init__(self, index: BlockIndex, *, max_blocks: int, is_told: Callable[[str], bool]) -> None:
        self._index = index
        self._warm = MemoryIndex(max_blocks=max_blocks, prefix_closed=False)
        self._pods: set[str] = set()
        self.is_told = is_told

    @property
    def prefix_closed(self) -> bool:
        """As the index within."""
        return self._index.prefix_closed

    def warm(self, model: str, pod: str, hashes: Sequence[int]) -> None:
        """`pod` is said to hold `hashes`, in whatever order."""
        if not self.is_told(pod):
            self._pods.add(pod)
            self._warm.add(model, pod, hashes, None)

    def is_warming(self, pod: str) -> bool:
        """Whether what counts for a pod was brought from elsewhere."""
        if pod in self._pods and self.is_told(pod):
            self._cool(pod)
        return pod in self._pods

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """By the pod's own events."""
        self._index.add(model, pod, hashes, parent)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """By the pod's own events."""
        gone = list(hashes)
        self._index.remove(model, pod, gone)
        if pod in self._pods:
            self._warm.remove(model, pod, gone)

    def clear(self, pod: str) -> None:
        """The index within; that a feed begins anew says nothing of what is known elsewhere."""
        self._index.clear(pod)

    def forget(self, pod: str) -> None:
        """Both."""
        self._index.forget(pod)
        self._cool(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        """Consecutive blocks per pod, from whichever knows more of a pod that has not told yet."""
        found = await self._index.match(model, hashes)
        if not self._pods:
            return found
        counts = dict(found)
        for pod, held in self._warm.count(model, hashes).items():
            if self.is_warming(pod):
                counts[pod] = max(held, counts.get(pod, 0))
        return counts

    async def flush(self) -> None:
        """The index within."""
        await self._index.flush()

    def stats(self) -> IndexStats:
        """Of both; pods and blocks of the index within."""
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
