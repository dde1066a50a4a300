"""The blocks of one model: their holders, their parents, and the order in which leaves were stored.

A table is a list of dicts (shards), and a block's hash selects one of them. When a dict grows, Python copies it in one
go: with a million blocks that would block the event loop for tens of milliseconds, but with a small dict only for a
fraction of one. All shards of a table grow at about the same time, so the tables have different numbers of shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from matrixinfer.index.room import is_roomy

Table: TypeAlias = list[dict[int, int]]
"""A sharded map whose keys are blocks: block `b` is in `table[b % len(table)]`."""

_SHARDS = (
    512,
    609,
    724,
    861,
    512,
)  # dicts per table, a quarter of a doubling apart; forks are few, so their table may share a size
_UNSHARDED_BLOCKS = 8_192  # up to this size a table is one dict, because there can be many models (adapters)
_SHARD_EVERY = 1_024  # blocks added between two looks at the sizes of tables
_SAMPLED_SHARDS = 16  # dicts to measure when estimating the size of a table
_HASH_BYTES = 48  # memory of an integer of 63 bits
_END = -1  # not a block: the sentinel before the oldest and after the newest leaf


class Tree:
    """The blocks of one model.

    `pods` maps blocks to the bits of their holders. A block that loses its last holder but has children stays, without
    bits, until its children are gone. Unless `chained`, blocks have no parents.
    """

    __slots__ = ("_added", "_chained", "_forks", "_leaves", "_parent_of", "_tidying", "pods", "size")

    def __init__(self, *, chained: bool) -> None:
        self.pods: Table = [{}]
        self.size = 0
        self._chained = chained
        self._parent_of: Table = [{}]  # for all blocks except roots
        self._forks: Table = [{}]  # number of children of blocks with two or more; other inner blocks have one child
        self._leaves = _Ring()
        self._added = 0  # blocks since the sizes of the tables were last looked at
        self._tidying = _tidying(self._tables())

    def insert(self, blocks: Sequence[int], parent: int | None) -> None:
        """Add new blocks that are already in `pods`: each follows the one before it, and the first follows `parent`."""
        self.size += len(blocks)
        self._added += len(blocks)
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
        """Make a leaf that was stored again the newest one."""
        if block in self._leaves:
            self._leaves.renew(block)

    def prune(self, empty: Iterable[int]) -> int:
        """Remove blocks that have lost all holders, if they are leaves. Returns how many blocks were removed."""
        removed, older = 0, self._leaves.older
        for block in empty:
            if block in older[block % len(older)]:
                removed += self._prune(block)
        self._tidy(removed)
        return removed

    def evict(self, blocks: int) -> int:
        """Remove up to `blocks` blocks from the end of the least recently stored branch, regardless of their holders.

        Returns how many blocks were removed.
        """
        removed = self._prune(self._leaves.oldest, evicted=blocks)
        self._tidy(removed)
        return removed

    def shard(self) -> None:
        """Split large tables into shards: one table per call, because each takes a millisecond."""
        if self._added < _SHARD_EVERY:
            return
        for table, shards in zip(self._tables(), _SHARDS, strict=True):
            if len(table) == 1 and len(table[0]) > _UNSHARDED_BLOCKS:
                _spread(table, shards)
                return
        self._added = 0

    def free(self) -> Iterator[int]:
        """Free an unused tree, dict by dict. Yields the number of entries of each dict."""
        for table in self._tables():
            while table:
                yield len(table.pop())

    def memory_bytes(self) -> int:
        """Estimated memory of the tables and the hashes."""
        return sum(map(_table_bytes, self._tables())) + _HASH_BYTES * self.size

    def _tidy(self, removed: int) -> None:
        """Look at a dict for every fourth block that was removed."""
        for _ in range(-(-removed // 4)):
            next(self._tidying)

    def _prune(self, leaf: int, evicted: int = 0) -> int:
        """Remove a leaf, and each ancestor that becomes a leaf, while they have no holders or fewer than `evicted` are gone.

        The ancestor that remains as a leaf inherits the age of `leaf`. Returns how many blocks were removed.
        """
        removed = 0
        block = leaf
        pods, shards = self.pods, len(self.pods)
        while not (shard := pods[block % shards])[block] or removed < evicted:
            removed += 1
            del shard[block]
            parent = self._parent_of[block % len(self._parent_of)].pop(block, None)
            if parent is None or self._lose_child(parent):
                self._leaves.remove(leaf)
                break
            block = parent
        else:
            self._leaves.replace(leaf, block)
        self.size -= removed
        return removed

    def _lose_child(self, parent: int) -> bool:
        """Count a removed child of `parent`. Returns whether other children are left."""
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
    """Blocks in order from oldest to newest: a doubly linked list in sharded tables, like a sharded `OrderedDict`.

    `older` and `newer` map a block to its neighbours. The neighbours of `_END` are the newest and the oldest block.
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
        """Append new blocks; the last one becomes the newest."""
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
        """Make a block the newest one."""
        if self.older[_END][_END] != block:
            self.remove(block)
            self.extend((block,))

    def remove(self, block: int) -> None:
        self._join(*self._pop(block))

    def replace(self, block: int, other: int) -> None:
        """Put a new block `other` in the place of `block`."""
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


def _tidying(tables: Iterable[Table]) -> Iterator[None]:
    """Look at one dict after the other, without end, and copy those that are roomy."""
    while True:
        for table in tables:
            for at in range(len(table)):
                if is_roomy(table[at]):
                    table[at] = dict(table[at])
                yield


def _table_bytes(table: Table) -> int:
    """Estimate the size of a table from a sample of its dicts, which are of similar size."""
    sample = table[:_SAMPLED_SHARDS]
    return sum(shard.__sizeof__() for shard in sample) * len(table) // max(1, len(sample))
