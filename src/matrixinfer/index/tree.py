"""The blocks of one model: who holds them, what follows what, and which leaf is the oldest.

Hashes are spread evenly, so a table is a list of dicts of which a block's hash chooses one. A dict that outgrows its
memory is copied in one go: at a million blocks that stalls the event loop for tens of milliseconds, in a small dict for
a fraction of one. As all dicts of a table fill up at about the same time, tables differ in how many they have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

Table: TypeAlias = list[dict[int, int]]
"""A map from blocks: block `b` is in `table[b % len(table)]`."""

_SHARDS = (512, 609, 724, 861, 512)  # dicts per table, a quarter of a doubling apart; leaves with forks are few
_UNSHARDED_BLOCKS = 8_192  # up to here a table is one dict: models can be many, as adapters are
_SAMPLED_SHARDS = 16  # dicts that tell how large a table is
_HASH_BYTES = 48  # of an integer of 63 bits
_END = -1  # no block: what precedes the oldest leaf and follows the newest


class Tree:
    """The blocks of one model.

    `pods` maps blocks to the bits of their holders. A block that loses its last holder while it has children stays,
    with no bits, until they go. Unless `chained`, every block stands alone.
    """

    __slots__ = ("_chained", "_forks", "_leaves", "_parent_of", "pods", "size")

    def __init__(self, *, chained: bool) -> None:
        self.pods: Table = [{}]
        self.size = 0
        self._chained = chained
        self._parent_of: Table = [{}]  # of all blocks but roots
        self._forks: Table = [{}]  # children of the blocks that have two or more; every other inner block has one
        self._leaves = _Ring()

    def insert(self, blocks: Sequence[int], parent: int | None) -> None:
        """Hang new blocks, which `pods` has already: each follows the one before it, and the first `parent`."""
        self.size += len(blocks)
        if not self._chained:
            self._leaves.extend(blocks)
            return
        if parent is not None:
            if parent in self._leaves:
                self._leaves.remove(parent)
            else:
                forks = self._forks[parent % len(self._forks)]
                forks[parent] = forks.get(parent, 1) + 1
        self._leaves.extend(blocks[-1:])
        table, shards = self._parent_of, len(self._parent_of)
        for block in blocks:
            if parent is not None:
                table[block % shards][block] = parent
            parent = block

    def touch(self, block: int) -> None:
        """A leaf that was stored again becomes the newest."""
        if block in self._leaves:
            self._leaves.renew(block)

    def prune(self, empty: Iterable[int]) -> int:
        """The blocks `empty` have no holders any more. Returns how many blocks left the tree."""
        return sum(self._prune(block) for block in empty if block in self._leaves)

    def evict(self, blocks: int) -> int:
        """Drop the end of the least recently stored branch, `blocks` blocks if it is as long, whoever holds them.

        Returns how many blocks left the tree.
        """
        return self._prune(self._leaves.oldest, evicted=blocks)

    def shard(self) -> None:
        """Once the tree is large, go over to many dicts: one table per call, as each takes a millisecond."""
        if self.size <= _UNSHARDED_BLOCKS or len(self._forks) > 1:
            return
        for table, shards in zip(self._tables(), _SHARDS, strict=True):
            if len(table) == 1:
                _spread(table, shards)
                return

    def shed(self) -> Iterator[int]:
        """Free a tree that is out of use, dict by dict. Yields how many entries each had."""
        for table in self._tables():
            while table:
                yield len(table.pop())

    def memory_bytes(self) -> int:
        """Estimate: tables and hashes."""
        return sum(map(_table_bytes, self._tables())) + _HASH_BYTES * self.size

    def _prune(self, leaf: int, evicted: int = 0) -> int:
        """Remove a leaf and every ancestor that thereby becomes one, if empty or among the first `evicted`.

        One that is held takes the place of `leaf` in age. Returns how many blocks were removed.
        """
        removed = 0
        block = leaf
        pods, shards = self.pods, len(self.pods)
        while not (shard := pods[block % shards])[block] or removed < evicted:
            removed += 1
            del shard[block]
            parent = self._parent_of[block % len(self._parent_of)].pop(block, None)
            if parent is None or self._has_other_children(parent):
                self._leaves.remove(leaf)
                break
            block = parent
        else:
            self._leaves.replace(leaf, block)
        self.size -= removed
        return removed

    def _has_other_children(self, parent: int) -> bool:
        """A child of `parent` has gone: whether others are left."""
        forks = self._forks[parent % len(self._forks)]
        children = forks.get(parent, 1)
        if children > 2:
            forks[parent] = children - 1
        elif children == 2:
            del forks[parent]
        return children > 1

    def _tables(self) -> tuple[Table, ...]:
        return self.pods, self._parent_of, self._leaves.older, self._leaves.newer, self._forks


class _Ring:
    """Blocks from the oldest to the newest, as an `OrderedDict` would keep them if it could be sharded.

    `older` and `newer` map a block to its neighbours; those of `_END` are the newest and the oldest.
    """

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.older: Table = [{_END: _END}]
        self.newer: Table = [{_END: _END}]

    def __contains__(self, block: int) -> bool:
        return block in self.older[block % len(self.older)]

    @property
    def oldest(self) -> int:
        return self.newer[_END][_END]

    def extend(self, blocks: Sequence[int]) -> None:
        """Take new blocks as the newest, the last one most so."""
        older, newer = self.older, self.newer
        olders, newers = len(older), len(newer)
        last = older[_END][_END]
        for block in blocks:
            newer[last % newers][last] = block
            older[block % olders][block] = last
            last = block
        newer[last % newers][last] = _END
        older[_END][_END] = last

    def renew(self, block: int) -> None:
        """Make a block the newest."""
        if self.older[_END][_END] != block:
            self.remove(block)
            self.extend((block,))

    def remove(self, block: int) -> None:
        self._join(*self._pop(block))

    def replace(self, block: int, other: int) -> None:
        """A new block `other` takes the place of `block`."""
        older, newer = self._pop(block)
        self._join(older, other)
        self._join(other, newer)

    def _pop(self, block: int) -> tuple[int, int]:
        return self.older[block % len(self.older)].pop(block), self.newer[block % len(self.newer)].pop(block)

    def _join(self, older: int, newer: int) -> None:
        self.newer[older % len(self.newer)][older] = newer
        self.older[newer % len(self.older)][newer] = older


def _spread(table: Table, shards: int) -> None:
    (whole,) = table
    table[:] = ({} for _ in range(shards))
    for block, value in whole.items():
        table[block % shards][block] = value


def _table_bytes(table: Table) -> int:
    """An estimate: dicts of one table are about as large as each other."""
    sample = table[:_SAMPLED_SHARDS]
    return sum(shard.__sizeof__() for shard in sample) * len(table) // max(1, len(sample))
