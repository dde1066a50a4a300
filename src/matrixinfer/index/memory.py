"""The embedded index: one dict per model from block hash to the set of pods that hold it.

A set of pods is an integer with one bit per pod; equal sets share one object. The blocks of a model form a tree, by
parent, so that a memory bound can evict children before parents: what remains is always a prefix. Only the bound needs
the tree, look-ups never touch it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from matrixinfer.index.base import IndexStats

_NAMED_SETS_KEPT = 4_096  # pod sets whose names are kept at hand, as most look-ups meet the same few
_INTERNED_SETS_KEPT = 65_536  # distinct pod sets that share one object each; beyond it sharing starts anew


class MemoryIndex:
    """A `BlockIndex` in this process. Not thread-safe: it belongs to one event loop.

    `max_blocks` bounds the distinct blocks over all models. With `prefix_closed` (hash scheme `prefix`) a pod's chain
    has no holes: a block is taken only after its parent, and look-ups gallop. Without it every block stands alone and
    look-ups walk.
    """

    def __init__(self, *, max_blocks: int = 4_000_000, prefix_closed: bool = True) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
        self._max_blocks = max_blocks
        self._prefix_closed = prefix_closed
        self._trees: dict[str, _Tree] = {}
        self._blocks = 0
        self._evicted = 0
        self._bit_of: dict[str, int] = {}
        self._pod_of: dict[int, str] = {}
        self._live = 0  # bits of pods that count
        self._names_of: dict[int, list[str]] = {}  # a set's pods by name, until pods come or go
        self._dead: list[int] = []  # bits of cleared pods, still set in blocks
        self._next_bit = 1
        self._free_bits: list[int] = []
        self._reclaim: Iterator[None] | None = None
        self._interned: dict[int, int] = {}

    @property
    def prefix_closed(self) -> bool:
        """Whether look-ups gallop."""
        return self._prefix_closed

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """Record consecutive blocks. Blocks whose parent the pod does not hold are unreachable and not taken."""
        if not hashes:
            return
        tree = self._trees.get(model) or _Tree()
        bit = self._bit_of.get(pod, 0)
        if not self._prefix_closed:
            parent = None
        elif parent is not None and not tree.pods.get(parent, 0) & bit:
            return
        self._trees[model] = tree
        bit = bit or self._new_bit(pod)
        pods = tree.pods
        for block in hashes:
            held = pods.get(block)
            if held is None:
                tree.insert(block, parent)
                pods[block] = bit
                self._blocks += 1
            elif not held & bit:
                pods[block] = self._intern(held | bit)
            if self._prefix_closed:
                parent = block
        tree.touch(hashes[-1])
        if self._blocks > self._max_blocks:
            self._evict()
        self._reclaim_some(2 * len(hashes) + 16)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """Forget that `pod` holds `hashes`."""
        tree = self._trees.get(model)
        bit = self._bit_of.get(pod)
        if tree is None or bit is None:
            return
        pods = tree.pods
        for block in hashes:
            held = pods.get(block, 0)
            if held & bit:
                self._set(tree, block, held ^ bit)
        self._drop_if_empty(model, tree)
        self._reclaim_some(16)

    def clear(self, pod: str) -> None:
        """Forget all that `pod` holds, at once: its bit is retired, and struck from the blocks by later writes."""
        bit = self._bit_of.pop(pod, None)
        if bit is None:
            return
        del self._pod_of[bit]
        self._names_of.clear()
        self._live &= ~bit
        self._dead.append(bit)
        if not self._live:
            self._start_over()

    def forget(self, pod: str) -> None:
        """As `clear`: nothing else is kept per pod."""
        self.clear(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """Consecutive blocks per pod; see `count`."""
        return self.count(model, hashes)

    def count(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """How many blocks each pod holds consecutively from the start; pods that hold none are absent."""
        tree = self._trees.get(model)
        if tree is None or not self._live or not hashes:
            return {}
        return self._gallop(tree.pods, hashes) if self._prefix_closed else self._walk(tree.pods, hashes)

    async def flush(self) -> None:
        """Nothing is buffered."""

    def stats(self) -> IndexStats:
        """Counts; memory counts tables and the integers in them."""
        tables = sum(tree.memory_bytes() for tree in self._trees.values())
        return IndexStats(
            blocks=self._blocks,
            pods=len(self._bit_of),
            evicted=self._evicted,
            memory_bytes=tables + self._interned.__sizeof__(),
        )

    # Look-up

    def _walk(self, pods: dict[int, int], hashes: Sequence[int]) -> dict[str, int]:
        counts: dict[str, int] = {}
        holders = self._live
        position = 0
        for block in hashes:
            still = pods.get(block, 0) & holders
            if still != holders:
                if position:
                    self._name(holders & ~still, position, counts)
                if not still:
                    return counts
                holders = still
            position += 1
        self._name(holders, position, counts)
        return counts

    def _gallop(self, pods: dict[int, int], hashes: Sequence[int]) -> dict[str, int]:
        """Exponential search for the positions at which holders drop out, each then found by bisection.

        Valid because the holders of a block hold all blocks before it: the set only shrinks along the chain.
        """
        counts: dict[str, int] = {}
        low, last = 0, len(hashes) - 1
        holders = pods.get(hashes[0], 0) & self._live
        while holders and low < last:
            high = min(2 * low + 1, last)
            still = pods.get(hashes[high], 0) & holders
            if still != holders:
                self._bisect(pods, hashes, low, holders, high, still, counts)
            low, holders = high, still
        if holders:
            self._name(holders, low + 1, counts)
        return counts

    def _bisect(
        self,
        pods: dict[int, int],
        hashes: Sequence[int],
        low: int,
        at_low: int,
        high: int,
        at_high: int,
        counts: dict[str, int],
    ) -> None:
        """Name the pods that hold block `low` but not block `high`."""
        while high - low > 1:
            middle = (low + high) // 2
            at_middle = pods.get(hashes[middle], 0) & at_low
            if at_middle == at_low:
                low = middle
            elif at_middle == at_high:
                high = middle
            else:
                self._bisect(pods, hashes, low, at_low, middle, at_middle, counts)
                low, at_low = middle, at_middle
        self._name(at_low & ~at_high, high, counts)

    def _name(self, bits: int, count: int, counts: dict[str, int]) -> None:
        names = self._names_of.get(bits)
        if names is None:
            if len(self._names_of) >= _NAMED_SETS_KEPT:
                self._names_of.clear()
            names = self._names_of[bits] = [pod for bit, pod in self._pod_of.items() if bits & bit]
        counts.update(dict.fromkeys(names, count))

    # Memory

    def _new_bit(self, pod: str) -> int:
        if self._free_bits:
            bit = self._free_bits.pop()
        else:
            bit = self._next_bit
            self._next_bit <<= 1
        self._bit_of[pod] = bit
        self._pod_of[bit] = pod
        self._names_of.clear()
        self._live |= bit
        return bit

    def _intern(self, bits: int) -> int:
        if len(self._interned) >= _INTERNED_SETS_KEPT:
            self._interned.clear()
        return self._interned.setdefault(bits, bits)

    def _set(self, tree: _Tree, block: int, bits: int) -> None:
        if bits:
            tree.pods[block] = self._intern(bits)
        else:
            self._blocks -= tree.vacate(block)

    def _evict(self) -> None:
        while self._blocks > self._max_blocks:
            model, tree = max(self._trees.items(), key=lambda item: len(item[1].pods))
            removed = tree.evict_leaf()
            self._drop_if_empty(model, tree)
            self._blocks -= removed
            self._evicted += removed

    def _start_over(self) -> None:
        """No pod is left: drop everything instead of striking it out piece by piece."""
        self._trees.clear()
        self._interned.clear()
        self._free_bits.clear()
        self._dead.clear()
        self._reclaim = None
        self._blocks = 0
        self._next_bit = 1

    def _reclaim_some(self, steps: int) -> None:
        if self._reclaim is None:
            if not self._dead:
                return
            self._reclaim = self._reclaiming()
        for _ in range(steps):
            if next(self._reclaim, self) is self:
                self._reclaim = None
                return

    def _reclaiming(self) -> Iterator[None]:
        """Strike the bits of cleared pods from every block, then hand them out again; one block per step."""
        dead_bits, self._dead = self._dead, []
        dead = sum(dead_bits)
        for model, tree in list(self._trees.items()):
            for block in list(tree.pods):
                held = tree.pods.get(block, 0)
                if held & dead:
                    self._set(tree, block, held & ~dead)
                yield
            self._drop_if_empty(model, tree)
        self._free_bits += dead_bits

    def _drop_if_empty(self, model: str, tree: _Tree) -> None:
        if not tree.pods and self._trees.get(model) is tree:
            del self._trees[model]


class _Tree:
    """The blocks of one model: their holders, and their shape.

    `leaves` are the blocks without children, the least recently stored first. `forks` counts the children of blocks
    that have two or more; every other inner block has one. A block that loses its last holder while it has children
    stays as an empty node until they go.
    """

    __slots__ = ("forks", "leaves", "parent_of", "pods")

    def __init__(self) -> None:
        self.pods: dict[int, int] = {}
        self.parent_of: dict[int, int | None] = {}
        self.leaves: OrderedDict[int, None] = OrderedDict()
        self.forks: dict[int, int] = {}

    def insert(self, block: int, parent: int | None) -> None:
        """Hang a new block below `parent`, as the newest leaf."""
        self.parent_of[block] = parent
        self.leaves[block] = None
        if parent is None:
            return
        if parent in self.leaves:
            del self.leaves[parent]
        else:
            self.forks[parent] = self.forks.get(parent, 1) + 1

    def touch(self, block: int) -> None:
        """A leaf that was stored again becomes the newest."""
        if block in self.leaves:
            self.leaves.move_to_end(block)

    def vacate(self, block: int) -> int:
        """Nobody holds `block` now. Returns how many blocks left the tree."""
        self.pods[block] = 0
        return self._prune(block) if block in self.leaves else 0

    def evict_leaf(self) -> int:
        """Drop the least recently stored leaf, whoever holds it. Returns how many blocks left the tree."""
        block = next(iter(self.leaves))
        self.pods[block] = 0
        return self._prune(block)

    def _prune(self, leaf: int) -> int:
        """Remove an empty leaf, and every ancestor that thereby becomes one."""
        removed = 0
        block: int | None = leaf
        while block is not None and not self.pods[block]:
            removed += 1
            del self.pods[block]
            del self.leaves[block]
            parent = self.parent_of.pop(block)
            if parent is None:
                break
            children = self.forks.get(parent, 1)
            if children > 2:
                self.forks[parent] = children - 1
                break
            if children == 2:
                del self.forks[parent]
                break
            self.leaves[parent] = None
            self.leaves.move_to_end(parent, last=False)
            block = parent
        return removed

    def memory_bytes(self) -> int:
        """Estimate: the tables, 48 bytes for each hash, and what an ordered entry costs beyond a plain one."""
        tables = self.pods.__sizeof__() + self.parent_of.__sizeof__() + self.forks.__sizeof__()
        return tables + self.leaves.__sizeof__() + 48 * len(self.pods)
