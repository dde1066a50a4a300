"""The embedded index: a table per model from block hash to the set of pods that hold it.

A set of pods is an integer with one bit per pod; equal sets share one object. The blocks of a model form a tree, by
parent, so that a memory bound can evict children before parents: what remains is always a prefix. Look-ups need no more
of a tree than its table of pods. No call stalls the event loop: whatever takes long is left to later writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from matrixinfer.index.base import IndexStats
from matrixinfer.index.tree import Tree

_NAMED_SETS_KEPT = 4_096  # pod sets whose names are kept at hand, as most look-ups meet the same few
_INTERNED_SETS_KEPT = 65_536  # distinct pod sets that share one object each; beyond it sharing starts anew
_STRUCK_TOGETHER = 16  # blocks per piece of work
_SHED_STEPS = 64  # that freeing an emptied dict counts for


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
        self._trees: dict[str, Tree] = {}
        self._blocks = 0
        self._evicted = 0
        self._bit_of: dict[str, int] = {}
        self._pod_of: dict[int, str] = {}
        self._live = 0  # bits of pods that count
        self._names_of: dict[int, list[str]] = {}  # a set's pods by name, until pods come or go
        self._dead: list[int] = []  # bits of cleared pods, still set in blocks
        self._next_bit = 1
        self._free_bits: list[int] = []
        self._dropped: list[Tree] = []  # trees out of use, freed by later writes
        self._reclaim: Iterator[int] | None = None
        self._interned: dict[int, int] = {}

    @property
    def prefix_closed(self) -> bool:
        """Whether look-ups gallop."""
        return self._prefix_closed

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """Record consecutive blocks. Blocks whose parent the pod does not hold are unreachable and not taken."""
        if not hashes:
            return
        tree = self._trees.get(model) or Tree(chained=self._prefix_closed)
        bit = self._bit_of.get(pod, 0)
        if self._prefix_closed and parent is not None and not tree.pods[parent % len(tree.pods)].get(parent, 0) & bit:
            return
        self._trees[model] = tree
        bit = bit or self._new_bit(pod)
        self._blocks += self._store(tree, bit, hashes, parent)
        tree.touch(hashes[-1])
        tree.shard()
        if self._blocks > self._max_blocks:
            self._evict()
        self._reclaim_some(len(hashes) + 16)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """Forget that `pod` holds `hashes`."""
        tree = self._trees.get(model)
        bit = self._bit_of.get(pod)
        if tree is None or bit is None:
            return
        self._strike(tree, bit, hashes)
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
        return self._gallop(tree, hashes) if self._prefix_closed else self._walk(tree, hashes)

    async def flush(self) -> None:
        """Nothing is buffered."""

    def stats(self) -> IndexStats:
        """Counts; memory counts tables and the integers in them."""
        tables = sum(tree.memory_bytes() for tree in [*self._trees.values(), *self._dropped])
        return IndexStats(
            blocks=self._blocks,
            pods=len(self._bit_of),
            evicted=self._evicted,
            memory_bytes=tables + self._interned.__sizeof__(),
        )

    # Look-up

    def _walk(self, tree: Tree, hashes: Sequence[int]) -> dict[str, int]:
        pods, shards = tree.pods, len(tree.pods)
        counts: dict[str, int] = {}
        holders = self._live
        position = 0
        for block in hashes:
            still = pods[block % shards].get(block, 0) & holders
            if still != holders:
                if position:
                    self._name(holders & ~still, position, counts)
                if not still:
                    return counts
                holders = still
            position += 1
        self._name(holders, position, counts)
        return counts

    def _gallop(self, tree: Tree, hashes: Sequence[int]) -> dict[str, int]:
        """Exponential search for the positions at which holders drop out, each then found by bisection.

        Valid because the holders of a block hold all blocks before it: the set only shrinks along the chain.
        """
        pods, shards = tree.pods, len(tree.pods)
        counts: dict[str, int] = {}
        low, last = 0, len(hashes) - 1
        block = hashes[0]
        holders = pods[block % shards].get(block, 0) & self._live
        while holders and low < last:
            high = min(2 * low + 1, last)
            block = hashes[high]
            still = pods[block % shards].get(block, 0) & holders
            if still != holders:
                self._bisect(tree, hashes, low, holders, high, still, counts)
            low, holders = high, still
        if holders:
            self._name(holders, low + 1, counts)
        return counts

    def _bisect(
        self,
        tree: Tree,
        hashes: Sequence[int],
        low: int,
        at_low: int,
        high: int,
        at_high: int,
        counts: dict[str, int],
    ) -> None:
        """Name the pods that hold block `low` but not block `high`."""
        pods, shards = tree.pods, len(tree.pods)
        while high - low > 1:
            middle = (low + high) // 2
            block = hashes[middle]
            at_middle = pods[block % shards].get(block, 0) & at_low
            if at_middle == at_low:
                low = middle
            elif at_middle == at_high:
                high = middle
            else:
                self._bisect(tree, hashes, low, at_low, middle, at_middle, counts)
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

    def _store(self, tree: Tree, bit: int, hashes: Sequence[int], parent: int | None) -> int:
        """Set `bit` for consecutive blocks. Returns how many are new."""
        before = tree.size
        pods, shards = tree.pods, len(tree.pods)
        new: list[int] = []
        for block in hashes:
            shard = pods[block % shards]
            held = shard.get(block)
            if held is None:
                shard[block] = bit
                new.append(block)
                continue
            if not held & bit:
                shard[block] = self._intern(held | bit)
            if new:
                tree.insert(new, parent)
                new = []
            parent = block
        if new:
            tree.insert(new, parent)
        return tree.size - before

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

    def _strike(self, tree: Tree, bits: int, blocks: Iterable[int]) -> None:
        """Clear `bits` of blocks."""
        pods, shards = tree.pods, len(tree.pods)
        empty: list[int] = []
        for block in blocks:
            shard = pods[block % shards]
            held = shard.get(block, 0)
            if held & bits:
                left = held & ~bits
                shard[block] = left and self._intern(left)
                if not left:
                    empty.append(block)
        self._blocks -= tree.prune(empty)

    def _evict(self) -> None:
        while self._blocks > self._max_blocks:
            model, tree = max(self._trees.items(), key=lambda item: item[1].size)
            while self._blocks > self._max_blocks and tree.size:
                removed = tree.evict(self._blocks - self._max_blocks)
                self._blocks -= removed
                self._evicted += removed
            self._drop_if_empty(model, tree)

    def _start_over(self) -> None:
        """No pod is left: drop everything instead of striking it out piece by piece."""
        self._dropped += self._trees.values()
        self._trees.clear()
        self._interned.clear()
        self._free_bits.clear()
        self._dead.clear()
        self._reclaim = None
        self._blocks = 0
        self._next_bit = 1

    def _reclaim_some(self, steps: int) -> None:
        if self._reclaim is None:
            if not (self._dropped or self._dead):
                return
            self._reclaim = self._reclaiming()
        while steps > 0:
            done = next(self._reclaim, None)
            if done is None:
                self._reclaim = None
                return
            steps -= done

    def _reclaiming(self) -> Iterator[int]:
        """Free dropped trees; strike the bits of cleared pods from every block, then hand them out again.

        Yields after each small piece of work how many steps it took.
        """
        while self._dropped:
            for entries in self._dropped[0].shed():
                yield max(_SHED_STEPS, entries)
            del self._dropped[0]
        dead_bits, self._dead = self._dead, []
        dead = sum(dead_bits)
        for model, tree in list(self._trees.items()):
            for shard in tree.pods:
                held = list(shard)
                for start in range(0, len(held), _STRUCK_TOGETHER):
                    struck = held[start : start + _STRUCK_TOGETHER]
                    self._strike(tree, dead, struck)
                    yield len(struck)
            self._drop_if_empty(model, tree)
        self._free_bits += dead_bits

    def _drop_if_empty(self, model: str, tree: Tree) -> None:
        if not tree.size and self._trees.get(model) is tree:
            self._dropped.append(self._trees.pop(model))
