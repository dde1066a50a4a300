"""The engine blocks that one engine holds, as chains."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import takewhile

from matrixinfer.blocks import Medium
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.table import BlockTable

_TABLE_BYTES = 2_048 * 70
_BLOCK_BYTES = 20
_RUN_BYTES = 360


class Forest:
    """The engine blocks of one medium and attention group.

    An engine's hash covers everything before the block, so a block has only one parent.
    """

    __slots__ = ("_free", "_runs", "_table", "branches", "copies", "cut", "ended", "tier")

    def __init__(self, tier: int = 0) -> None:
        self.tier = tier
        """The tier of the medium (`matrixinfer.kvevents.tiers`)."""
        self._table = BlockTable()  # block -> number of its run
        self._runs: list[Run | None] = []
        self._free: list[int] = []
        self.branches: dict[int | None, dict[int, Run]] = {}
        """The runs that branch off a block (None: the root), by their first blocks."""
        self.copies: dict[int, int] = {}
        """Copies beyond the first."""
        self.cut: set[int] = set()
        """Present, but an ancestor is not."""
        self.ended: set[int] = set()
        """Present, but neither they nor what follows them is indexed."""

    def __len__(self) -> int:
        return len(self._table) + len(self.ended)

    def __contains__(self, block: int) -> bool:
        return self._table.get(block) is not None or block in self.ended

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of any block."""
        return not (len(self) or any(self._runs) or self.branches or self.copies or self.cut)

    @property
    def memory_bytes(self) -> int:
        """Estimated memory, without the blocks' tokens."""
        return _TABLE_BYTES + _BLOCK_BYTES * len(self) + _RUN_BYTES * (len(self._runs) - len(self._free))

    def run_of(self, block: int) -> Run | None:
        """The run that `block` is in; None for blocks that are absent or not indexed."""
        number = self._table.get(block)
        return None if number is None else self._runs[number]

    def has_child(self, parent: int | None, above: Run | None, block: int) -> bool:
        """Whether `block` follows `parent`, a block of the run `above`, or the root. Not for cut blocks."""
        if block in self.branches.get(parent, ()):
            return True
        if parent is None or above is None or above.ends_with(parent):
            return False
        return above[above.position(parent) + 1] == block

    def children(self, block: int) -> Iterator[int]:
        """The blocks that follow `block` directly."""
        yield from self.branches.get(block, {})
        run = self.run_of(block)
        if run is not None and not run.ends_with(block):
            yield run[run.position(block) + 1]

    def extend(self, run: Run, ids: Sequence[int], tokens: bytes, media: Sequence[Medium] = ()) -> None:
        """Append new blocks to a run, as `Run.append` does. A run that was empty joins the forest."""
        if not run.ids:
            self._take_in(run, ids[0])
        run.append(ids, tokens, media)
        self._table.add(ids, run.number)

    def last_first(self, blocks: Sequence[int]) -> list[int]:
        """The blocks, run by run, with the last of each run first: taking a run apart from its beginning is costly.

        Engines name the blocks of a chain in its order or against it, so the ends of the list show which.
        """
        runs: dict[Run | None, list[int]] = {}
        for block in blocks:
            runs.setdefault(self.run_of(block), []).append(block)
        for run, found in runs.items():
            if run is not None and run.position(found[0]) < run.position(found[-1]):
                found.reverse()
        return [block for found in runs.values() for block in found]

    def pop_last(self, blocks: Sequence[int], shrunk: dict[Run, None]) -> list[int]:
        """Remove those of `blocks` that are the last of their run with nothing below them; return the others.

        Blocks are taken in order, so neighbours should come last block first. The runs they were in are added to
        `shrunk`, those that branch off others before these; their tokens and names are left as they are.
        """
        left: list[int] = []
        first, count = 0, len(blocks)
        if count == 1:  # while engines decode, they evict one block at a time
            run = self.run_of(blocks[0])
            if run is None or blocks[0] in self.branches or not run.ends_with(blocks[0]):
                return [*blocks]
            shrunk[run] = None
            self.drop_last(run, blocks[0])
            return left
        backwards = array("Q", blocks[::-1]).tobytes()
        while first < count:
            run = self.run_of(blocks[first])
            some = blocks[first : first + run.shared_end(backwards, count - first)] if run is not None else ()
            if not self.branches.keys().isdisjoint(some):
                some = list(takewhile(self._is_leaf, some))
            if run is None or not some:
                left.append(blocks[first])
                first += 1
                continue
            del run.ids[-8 * len(some) :]
            self._table.discard(some)
            shrunk.pop(run, None)  # a run is the last one to shrink before those that it branches off from
            shrunk[run] = None
            first += len(some)
            if not run.ids:
                self._leave_out(run, some[-1])
        return left

    def _is_leaf(self, block: int) -> bool:
        """Whether no run branches off `block`."""
        return block not in self.branches

    def drop_last(self, run: Run, block: int) -> None:
        """Remove the last block of a run, whatever is below it."""
        self._table.discard((block,))
        del run.ids[-8:]
        if not run.ids:
            self._leave_out(run, block)

    def split(self, run: Run, position: int) -> None:
        """Make the blocks after `position` a run of their own, which branches off there."""
        rest = run.split(position)
        self._take_in(rest, rest[0])
        self._table.discard(rest)
        self._table.add(rest, rest.number)

    def below(self, block: int | None) -> Iterator[tuple[Run, int, int]]:
        """(run, position, block) for every block in the runs that branch off `block` (None: the root), parents first.

        Raises `ValueError` for a block that follows itself, which only contradictory events produce.
        """
        pending = list(self.branches.get(block, {}).values())
        visits = 0
        while pending:
            run = pending.pop()
            visits += 1
            if visits > len(self._runs):
                raise ValueError("a block follows itself")
            for position, child in enumerate(run):
                yield run, position, child
                pending += self.branches.get(child, {}).values()

    def _take_in(self, run: Run, first: int) -> None:
        if self._free:
            run.number = self._free.pop()
            self._runs[run.number] = run
        else:
            run.number = len(self._runs)
            self._runs.append(run)
        self.branches.setdefault(run.parent, {})[first] = run

    def _leave_out(self, run: Run, first: int) -> None:
        siblings = self.branches[run.parent]
        del siblings[first]
        if not siblings:
            del self.branches[run.parent]
        self._runs[run.number] = None
        self._free.append(run.number)
