"""The engine blocks that one engine holds, by the chains that they form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matrixinfer.kvevents.run import Run, pack_id
from matrixinfer.kvevents.table import BlockTable

_TABLE_BYTES = 2_048 * 70
_BLOCK_BYTES = 20
_RUN_BYTES = 360


class Forest:
    """The engine blocks of one medium and attention group.

    An engine's hash names a block by all that precedes it too, so a block is nobody's child but its parent's.
    """

    __slots__ = ("_free", "_runs", "_table", "branches", "copies", "cut", "ended", "tier")

    def __init__(self, tier: int = 0) -> None:
        self.tier = tier
        """Of the medium (`matrixinfer.kvevents.tiers`)."""
        self._table = BlockTable()  # block -> number of its run
        self._runs: list[Run | None] = []
        self._free: list[int] = []
        self.branches: dict[int | None, dict[int, Run]] = {}
        """Block (None: the root) to the runs that branch off it, by their first blocks."""
        self.copies: dict[int, int] = {}
        """Copies beyond the first."""
        self.cut: set[int] = set()
        """Present, but an ancestor is gone."""
        self.ended: set[int] = set()
        """Present, but not indexed, nor what follows."""

    def __len__(self) -> int:
        return len(self._table) + len(self.ended)

    def __contains__(self, block: int) -> bool:
        return self._table.get(block) is not None or block in self.ended

    @property
    def memory_bytes(self) -> int:
        """Memory without the blocks' tokens, estimated."""
        return _TABLE_BYTES + _BLOCK_BYTES * len(self) + _RUN_BYTES * (len(self._runs) - len(self._free))

    def run_of(self, block: int) -> Run | None:
        """The run that `block` is in; None also for blocks that are not indexed."""
        number = self._table.get(block)
        return None if number is None else self._runs[number]

    def has_child(self, parent: int | None, above: Run | None, block: int) -> bool:
        """Whether `block` is present below `parent`, a block of the run `above`, or the root. Not for cut blocks."""
        if block in self.branches.get(parent, ()):
            return True
        if parent is None or above is None or above.ends_with(parent):
            return False
        return above[above.position(parent) + 1] == block

    def extend(self, run: Run, ids: Sequence[int], tokens: bytes) -> None:
        """Append new blocks to a run. A run that was empty is taken in."""
        if not run.ids:
            self._take_in(run, ids[0])
        run.append(ids, tokens)
        self._table.add(ids, run.number)

    def pop_last(self, blocks: Sequence[int], shrunk: dict[Run, None]) -> list[int]:
        """Remove those of `blocks` that are the last of their run and have nothing below them; returns the others.

        Takes them in order, so that neighbours may be named end first. The runs concerned are added to `shrunk`: their
        tokens and names are not touched.
        """
        left, pop, runs, branches, pack = [], self._table.pop, self._runs, self.branches, pack_id
        for block in blocks:
            number = pop(block)
            if number is None:
                left.append(block)
                continue
            run = runs[number]
            if run is None or block in branches or not run.ids.endswith(pack(block)):
                self._table.add((block,), number)
                left.append(block)
                continue
            del run.ids[-8:]
            shrunk[run] = None
            if not run.ids:
                self._leave_out(run, block)
        return left

    def drop_last(self, run: Run, block: int) -> None:
        """Remove the last block of a run, whatever is below it."""
        self._table.pop(block)
        del run.ids[-8:]
        if not run.ids:
            self._leave_out(run, block)

    def split(self, run: Run, position: int) -> None:
        """Make the blocks behind `position` a run of their own, which branches off there."""
        rest = run.split(position)
        self._take_in(rest, rest[0])
        for block in rest:
            self._table.pop(block)
        self._table.add(rest, rest.number)

    def below(self, block: int | None) -> Iterator[tuple[Run, int, int]]:
        """Every present block in the runs that branch off `block` (None: the root), parents first: (run, position, block).

        Raises `ValueError` for blocks that follow themselves, which only events that contradict each other make.
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
