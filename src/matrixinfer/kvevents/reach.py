"""Token blocks in the index: those that a prompt can reach, covered by an unbroken path of engine blocks from the root.

For an engine block that begins before the end of a token block and ends within the next one, the index also gets the
tail, by which a lookup finds whether the whole engine block matches (`TokenBlockProcessor.overhang`).

Supports are counted per token block: the engine blocks `[a b]` and `[a c]` both support the token block `a`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.reusable import Reusable
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.tiers import DEVICE, Supported, Tiers


class Reach:
    """Supports the token blocks of the engine blocks that can be reached, and says to `reusable` which those are."""

    def __init__(self, tiers: Tiers, reusable: Reusable) -> None:
        self.has_tails = False
        """Engine blocks and token blocks straddle each other, so lookups must ask for tails."""
        self._tiers = tiers
        self._reusable = reusable
        self._rules = reusable.rules

    def add(self, forest: Forest, run: Run, position: int, ids: Sequence[int], parent: int | None) -> None:
        """Support the new blocks `ids`, from `position` of a run on, unless `parent` cannot be reached."""
        if parent in forest.cut:
            forest.cut.update(ids)
            return
        self._support(forest, run, position, len(run))
        if forest.cut:
            self._rejoin(forest, ids)

    def drop_end(self, forest: Forest, run: Run) -> None:
        """Drop the supports of the last blocks of a run, which have been removed."""
        self._unsupport(forest, run, len(run), run.recorded)
        run.truncate()

    def drop(self, forest: Forest, run: Run, block: int) -> None:
        """Drop the supports of `block`, the last of its run, and of everything below it, which is cut off."""
        last = len(run) - 1
        if block in forest.cut:
            forest.cut.discard(block)
        else:
            for below, position, child in _last_first(forest, block):
                forest.cut.add(child)
                self._unsupport(forest, below, position, position + 1)
                if self._rules.rule is not None:
                    self._reusable.touch((child,))
            self._unsupport(forest, run, last, last + 1)
        forest.drop_last(run, block)
        run.truncate()

    def drop_all(self, forest: Forest) -> None:
        """Drop every support of a forest."""
        for run, position, block in _last_first(forest, None):
            if block not in forest.cut:
                self._unsupport(forest, run, position, position + 1)
        self._tiers.flush()

    def open(self, tier: int, forests: Iterable[Forest]) -> None:
        """Prepare for blocks on `tier`. The index learns which of the `forests`' blocks are on faster ones."""
        present = list(forests)
        self._tiers.open(tier, lambda fastest: _present(present, fastest))

    def _rejoin(self, forest: Forest, ids: Sequence[int]) -> None:
        """Support the blocks that were cut off while one of `ids` was absent."""
        for block in ids:
            for run, position, child in forest.below(block):
                forest.cut.discard(child)
                self._support(forest, run, position, position + 1)

    def _support(self, forest: Forest, run: Run, first: int, last: int) -> None:
        """Support the token blocks of the blocks [first, last) of a run, which can be reached."""
        if self._rules.rule is not None and forest.tier == DEVICE:
            self._reusable.touch(run[position] for position in range(first, last))
        for model, names, parent in _supported(run, first, last):
            self._tiers.add(forest.tier, model, names, parent)
        self.has_tails = self.has_tails or run.has_tails

    def _unsupport(self, forest: Forest, run: Run, first: int, last: int) -> None:
        """Drop the supports of the blocks [first, last) of a run, which can no longer be reached."""
        if run.has_tails:
            self._tiers.remove(forest.tier, run.model, [tail for _, tail in run.tails(first, last)])
        _, names = run.completed(first, last)
        if names:
            self._tiers.remove(forest.tier, run.model, names[::-1])


def _last_first(forest: Forest, block: int | None) -> Iterator[tuple[Run, int, int]]:
    """`Forest.below`, but children first: a shared index is written in several steps, and none may leave a block without parent."""
    return reversed([*forest.below(block)])


def _supported(run: Run, first: int, last: int) -> list[Supported]:
    """The token blocks and tails that the blocks [first, last) of a run support."""
    parent, names = run.completed(first, last)
    found: list[Supported] = [(run.model, names, parent)] if names else []
    if run.has_tails:
        found += [(run.model, [tail], before) for before, tail in run.tails(first, last)]
    return found


def _present(forests: Iterable[Forest], tier: int) -> Iterator[Supported]:
    """What the blocks on tiers up to `tier` support that can be reached, parents first."""
    for forest in forests:
        if forest.tier <= tier:
            for run, position, block in forest.below(None):
                if block not in forest.cut:
                    yield from _supported(run, position, position + 1)
