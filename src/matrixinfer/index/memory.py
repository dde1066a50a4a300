"""The embedded index: for each model, a table from block hash to the set of pods that hold the block.

A set of pods is an integer (`pod_sets`). The blocks of a model form a tree, linked by parent, so that eviction can remove
children before parents and always leaves prefixes (`tree`). Lookups use only the table (`holders`). No call
blocks the event loop for long: expensive work is spread over later writes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.index.base import IndexStats
from matrixinfer.index.holders import gallop, walk
from matrixinfer.index.pod_sets import PodSets
from matrixinfer.index.tree import Tree

_BLOCKS_PER_STEP = 16  # blocks to clear per piece of work
_FREE_STEPS = 64  # number of steps that freeing a dict counts for, at least
_NO_ENDS = IndexStats(blocks=0, pods=0, evicted=0, memory_bytes=0)


class MemoryIndex:
    """A `BlockIndex` in this process. Not thread-safe: it belongs to one event loop.

    `max_blocks` bounds the number of distinct blocks over all models, and that of marks of reusable ends as well. With
    `prefix_closed` (hash scheme `prefix`) a pod's chain has no holes: a block is added only after its parent, and lookups
    gallop. Without it, blocks are independent and lookups walk.
    """

    def __init__(self, *, max_blocks: int = 4_000_000, prefix_closed: bool = True) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
        self._max_blocks = max_blocks
        self._prefix_closed = prefix_closed
        self._trees: dict[str, Tree] = {}
        self._blocks = 0
        self._evicted = 0
        self._sets = PodSets()
        self._dropped: list[Tree] = []  # unused trees, freed by later writes
        self._reclaim: Iterator[int] | None = None
        self._ends: MemoryIndex | None = None  # reusable ends, by the names of their endpoints: they have no parents

    @property
    def prefix_closed(self) -> bool:
        """Whether lookups gallop."""
        return self._prefix_closed

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """Record consecutive blocks. Ignores them if the pod does not hold their parent: they would be unreachable."""
        if not hashes:
            return
        if pod.endswith(ENDS_SUFFIX):
            self._ends = self._ends or MemoryIndex(max_blocks=self._max_blocks, prefix_closed=False)
            self._ends.add(model, pod.removesuffix(ENDS_SUFFIX), hashes, None)
            return
        tree = self._trees.get(model) or Tree(chained=self._prefix_closed)
        bit = self._sets.bit(pod)
        if self._prefix_closed and parent is not None and not tree.pods[parent % len(tree.pods)].get(parent, 0) & bit:
            return
        self._trees[model] = tree
        bit = bit or self._sets.add(pod)
        self._blocks += self._store(tree, bit, hashes, parent)
        tree.touch(hashes[-1])
        tree.shard()
        if self._blocks > self._max_blocks:
            self._evict()
        self._reclaim_some(len(hashes) + 16)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """Record that `pod` no longer holds `hashes`."""
        if pod.endswith(ENDS_SUFFIX):
            if self._ends is not None:
                self._ends.remove(model, pod.removesuffix(ENDS_SUFFIX), hashes)
            return
        tree = self._trees.get(model)
        bit = self._sets.bit(pod)
        if tree is None or not bit:
            return
        self._clear_bits(tree, bit, hashes)
        self._drop_if_empty(model, tree)
        self._reclaim_some(16)

    def clear(self, pod: str) -> None:
        """Remove all blocks of `pod` in constant time: its bit is retired, and later writes clear it in the blocks."""
        if pod.endswith(ENDS_SUFFIX):
            if self._ends is not None:
                self._ends.clear(pod.removesuffix(ENDS_SUFFIX))
            return
        if self._sets.remove(pod) and not self._sets.live:
            self._start_over()

    def forget(self, pod: str) -> None:
        """As `clear`: there is no other bookkeeping per pod."""
        self.clear(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """Number of consecutive blocks per pod; see `count`."""
        return self.count(model, hashes)

    def count(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """How many blocks each pod holds, consecutively from the start; pods without a match are absent."""
        tree, sets = self._trees.get(model), self._sets
        if tree is None or not sets.live or not hashes:
            return {}
        counts: dict[str, int] = {}
        for bits, count in (gallop if self._prefix_closed else walk)(tree, hashes, sets.live):
            counts.update(dict.fromkeys(sets.names(bits), count))
        return counts

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> dict[str, int]:
        """The last of `hashes` that each pod holds; see `last_of`."""
        return self.last_of(model, pods, hashes)

    def last_of(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> dict[str, int]:
        """The position of the last of `hashes` that each of `pods` holds. Pods that hold none are absent."""
        found: dict[str, int] = {}
        wanted, ends = 0, []
        for pod in pods:
            if pod.endswith(ENDS_SUFFIX):
                ends.append(pod.removesuffix(ENDS_SUFFIX))
            else:
                wanted |= self._sets.bit(pod)
        if ends and self._ends is not None:
            places = self._ends.last_of(model, ends, hashes)
            found.update((pod + ENDS_SUFFIX, place) for pod, place in places.items())
        tree = self._trees.get(model)
        if tree is None or not wanted:
            return found
        table, shards = tree.pods, len(tree.pods)
        for position in range(len(hashes) - 1, -1, -1):
            if not wanted:
                break
            block = hashes[position]
            held = table[block % shards].get(block, 0) & wanted
            if held:
                found.update(dict.fromkeys(self._sets.names(held), position))
                wanted &= ~held
        return found

    async def flush(self) -> None:
        """Return at once: nothing is buffered."""

    def stats(self) -> IndexStats:
        """The current counters; `memory_bytes` covers the tables and the integers in them."""
        tables = sum(tree.memory_bytes() for tree in [*self._trees.values(), *self._dropped])
        ends = _NO_ENDS if self._ends is None else self._ends.stats()
        return IndexStats(
            blocks=self._blocks,
            pods=len(self._sets),
            evicted=self._evicted + ends.evicted,
            memory_bytes=tables + self._sets.memory_bytes + ends.memory_bytes,
        )

    # Memory

    def _store(self, tree: Tree, bit: int, hashes: Sequence[int], parent: int | None) -> int:
        """Set `bit` for consecutive blocks. Returns how many are new."""
        before = tree.size
        pods, shards, share = tree.pods, len(tree.pods), self._sets.share
        new: list[int] = []
        for block in hashes:
            shard = pods[block % shards]
            held = shard.get(block)
            if held is None:
                shard[block] = bit
                new.append(block)
                continue
            if not held & bit:
                shard[block] = share(held | bit)
            if new:
                tree.insert(new, parent)
                new = []
            parent = block
        if new:
            tree.insert(new, parent)
        return tree.size - before

    def _clear_bits(self, tree: Tree, bits: int, blocks: Iterable[int]) -> None:
        """Clear `bits` in the pod sets of `blocks`."""
        pods, shards, share = tree.pods, len(tree.pods), self._sets.share
        empty: list[int] = []
        for block in blocks:
            shard = pods[block % shards]
            held = shard.get(block, 0)
            if held & bits:
                left = held & ~bits
                shard[block] = left and share(left)
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
        """No pod is left: drop all trees instead of clearing bits block by block."""
        self._dropped += self._trees.values()
        self._trees.clear()
        self._sets.start_over()
        self._reclaim = None
        self._blocks = 0

    def _reclaim_some(self, steps: int) -> None:
        if self._reclaim is None:
            if not (self._dropped or self._sets.has_dead):
                return
            self._reclaim = self._reclaiming()
        while steps > 0:
            done = next(self._reclaim, None)
            if done is None:
                self._reclaim = None
                return
            steps -= done

    def _reclaiming(self) -> Iterator[int]:
        """Free dropped trees, then clear the bits of cleared pods in every block and make those bits reusable.

        Yields the number of steps after each small piece of work.
        """
        while self._dropped:
            for entries in self._dropped[0].free():
                yield max(_FREE_STEPS, entries)
            del self._dropped[0]
        dead_bits = self._sets.take_dead()
        dead = sum(dead_bits)
        for model, tree in list(self._trees.items()):
            for shard in tree.pods:
                held = list(shard)
                for start in range(0, len(held), _BLOCKS_PER_STEP):
                    some = held[start : start + _BLOCKS_PER_STEP]
                    self._clear_bits(tree, dead, some)
                    yield len(some)
            self._drop_if_empty(model, tree)
        self._sets.reuse(dead_bits)

    def _drop_if_empty(self, model: str, tree: Tree) -> None:
        if not tree.size and self._trees.get(model) is tree:
            self._dropped.append(self._trees.pop(model))
