"""Which attention group an event is about, and what that says of the engine.

The blocks of one group, the primary one, are indexed. Of the others it is enough to know which hashes they hold.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

from matrixinfer.kvevents.counts import LedgerStats
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.groups import Kind, kind_of
from matrixinfer.kvevents.limits import (
    CHUNKED,
    CHUNKED_ALONE,
    DROPPED_SIZES,
    DROPPED_WINDOWS,
    FINE_STATES,
    MISFITS,
    SPARSE_WINDOWS,
    UNLINKED,
    Limits,
)
from matrixinfer.kvevents.reach import Reach
from matrixinfer.kvevents.reusable import Reusable
from matrixinfer.kvevents.tiers import DEVICE, MAX_PLACES, Place, tier_of
from matrixinfer.kvevents.wire import BlockStored, block_ids, parent_of, tokens_of


class Grouping:
    """Takes the events of groups other than the primary one. `forests` is the ledger's."""

    def __init__(
        self,
        reusable: Reusable,
        forests: MutableMapping[Place, Forest],
        reach: Reach,
        *,
        stats: LedgerStats,
        limits: Limits,
    ) -> None:
        self._reusable = reusable
        self._rules = reusable.rules
        self._forests = forests
        self._reach = reach
        self._stats = stats
        self._limits = limits
        self._linked: set[int] = set()  # groups whose blocks the primary one has too
        self._strange: set[int] = set()  # groups whose blocks it has never had
        self._unlinked: dict[int, list[int]] = {}  # blocks of this batch in other groups

    @property
    def primary_forest(self) -> Forest | None:
        """The device's blocks of the group whose tokens are known."""
        return self._forests.get(("GPU", self._rules.primary or 0))

    def learn_new(self, events: Sequence[BlockStored]) -> None:
        """Learn of new groups first: what an event of one group means may depend on which others there are."""
        for event in events:
            if len(self._rules.specs) >= MAX_PLACES:
                return
            if event.group_idx and event.group_idx not in self._rules.specs:
                kind = kind_of(event)
                if kind is not None and event.block_size > 0 and tier_of(event.medium or "GPU") == DEVICE:
                    self._learn(event, kind, event.group_idx)

    def take(self, event: BlockStored, kind: Kind, group: int) -> bool:
        """Take an event on the device that is not of the primary group. Returns whether that is all there is to do."""
        reusable = self._reusable
        if not self._rules.is_plain(group, event.block_size):
            if group not in self._rules.specs and len(self._rules.specs) >= MAX_PLACES:
                self._stats.misfits += 1
                self._limits.note(MISFITS)
                return True
            self._learn(event, kind, group)
        if group == self._rules.primary and self._rules.is_rooted:
            return False
        tokens, ids = tokens_of(event), block_ids(event.block_hashes)
        is_dense = tokens is not None
        parent = parent_of(event) if is_dense else None
        if tokens is not None:
            reusable.linked(event, ids, parent, tokens)
        reusable.stored(group, ids, parent, is_dense=is_dense)
        if group == self._rules.primary and is_dense:
            return False
        if group == self._rules.primary:
            self._limits.note(SPARSE_WINDOWS, lasting=True)
        elif ids and group not in self._linked:
            self._unlinked.setdefault(group, []).extend(ids)
        self._stats.stored += len(ids)
        return True

    def note_drops(self) -> None:
        """The drops, or the groups, have changed."""
        for words, holds in (
            (DROPPED_SIZES, self._rules.drops_unevenly),
            (DROPPED_WINDOWS, self._rules.drops_beyond),
        ):
            if holds:
                self._limits.note(words, lasting=True)
            else:
                self._limits.drop(words)

    def settle(self) -> None:
        """A batch, or a slice of one, is over: bring the marks up to date."""
        self._reusable.settle(self.primary_forest)

    def reset(self) -> None:
        """Expect another engine."""
        self._linked.clear()
        self._strange.clear()
        self._unlinked.clear()

    def _learn(self, event: BlockStored, kind: Kind, group: int) -> None:
        """Learn what an event on the device says of its group."""
        reusable, before = self._reusable, self._rules.primary
        reusable.learn(group, kind, event.block_size, event.window, None if before is None else self.primary_forest)
        for spec in self._rules.specs.values():
            if spec.kind is Kind.CHUNKED and spec.span is None:
                self._limits.note(CHUNKED, lasting=True)
            if spec.kind is Kind.CHUNKED and not self._rules.is_rooted:
                self._limits.note(CHUNKED_ALONE, lasting=True)
            if spec.kind is Kind.MAMBA and spec.has_fine_blocks:
                self._limits.note(FINE_STATES, lasting=True)
        self.note_drops()
        if self._rules.primary == before:
            return
        forest = None if before is None else self._forests.pop(("GPU", before), None)
        if forest is not None:
            self._reach.drop_all(forest)  # its group still counts those blocks
        if self._rules.is_rooted:
            self._limits.drop(SPARSE_WINDOWS)
            self._limits.drop(CHUNKED_ALONE)

    def check_links(self) -> bool:
        """See whether the blocks of other groups, as a batch left them, are among those of the primary one.

        Returns whether there were any to look at.
        """
        if not self._unlinked:
            return False
        forest = self.primary_forest
        for group, blocks in self._unlinked.items():
            if forest is not None and any(block in forest for block in blocks):
                self._linked.add(group)
            elif self._rules.is_rooted:
                self._strange.add(group)
        self._unlinked.clear()
        self._strange -= self._linked
        if self._strange:
            self._limits.note(UNLINKED, lasting=True)
        else:
            self._limits.drop(UNLINKED)
        return True
