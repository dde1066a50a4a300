"""Reads one event at a time: the blocks that it stores or removes, and where.

An event is about one place, a cache medium and an attention group, whose blocks are a forest. Some publish more than
whole blocks of tokens: pages of a radix tree (`pages`), pieces of a block (`fine`), blocks that are named without their
tokens as they move to a slower tier, tiers that never publish evictions (`tiers.Unevicted`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from matrixinfer.blocks import token_bytes
from matrixinfer.kvevents.counts import LedgerStats, UntrustedEvents
from matrixinfer.kvevents.engine_blocks import EngineBlocks
from matrixinfer.kvevents.fine import Pieces
from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.grouping import Grouping
from matrixinfer.kvevents.groups import kind_of
from matrixinfer.kvevents.layout import Layout
from matrixinfer.kvevents.limits import (
    EXTRA_KEYS,
    MISFITS,
    SHARED_PAGES,
    SLOWER_TIERS,
    UNTRIED,
    Limits,
    spared,
    store_only,
    unknown_kind,
)
from matrixinfer.kvevents.pages import Pages
from matrixinfer.kvevents.reach import Reach
from matrixinfer.kvevents.reusable import Reusable
from matrixinfer.kvevents.stored import is_bare, keys_of_whole, media_ahead, tokens_in
from matrixinfer.kvevents.tiers import DEVICE, MAX_PLACES, Place, Tiers, Unevicted, tier_of
from matrixinfer.kvevents.wire import BlockRemoved, BlockStored, EngineHash, block_ids, parent_of, plain, tokens_of

_DEVICE_NAMES = ("GPU", None)
_UNEVICTED_BYTES = 100
_SMALL_PIECE = 16
"""Tokens that a piece of a block is taken to have, where their sum must stay plausible."""


class EventReader:
    """Applies single events. The ledger has it `settle` after each batch."""

    def __init__(
        self,
        *,
        reach: Reach,
        reusable: Reusable,
        tiers: Tiers,
        blocks: EngineBlocks,
        stats: LedgerStats,
        limits: Limits,
    ) -> None:
        self.forests: dict[Place, Forest] = {}
        """The blocks present, by place."""
        self.block_size: int | None = None
        """Tokens per engine block, the largest if they differ; None before the first."""
        self.layout = Layout()
        self.footprint = Footprint()
        self.tokens = 0
        """The most tokens that the blocks present can stand for, as of the last batch."""
        self.grouping = Grouping(reusable, self.forests, reach, stats=stats, limits=limits)
        self.pages = Pages()
        self._pieces = Pieces()
        self._unevicted = Unevicted()
        self._device_block_size: int | None = None
        self._reach = reach
        self._reusable = reusable
        self._rules = reusable.rules
        self._tiers = tiers
        self._blocks = blocks
        self._stats = stats
        self._limits = limits

    @property
    def count(self) -> int:
        """The number of distinct engine blocks present."""
        return sum(map(len, self.forests.values()))

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of tables and tokens."""
        forests = sum(forest.memory_bytes for forest in self.forests.values())
        return forests + _UNEVICTED_BYTES * len(self._unevicted) + 4 * (self.block_size or 0) * self.count

    def clear(self) -> None:
        """Forget every block."""
        self.forests.clear()
        self._tiers.clear()
        self._reusable.clear()
        self._pieces.clear()
        self.pages.clear()
        self._unevicted.clear()
        self._limits.clear()
        self._blocks.orphans.clear()
        self._measure()

    def clear_device(self) -> None:
        """The engine published a reset. One of the device need not reach the slower tiers, which keep their blocks."""
        if self.layout.is_radix or not any(forest.tier != DEVICE and len(forest) for forest in self.forests.values()):
            self.clear()
            return
        for place in [place for place, forest in self.forests.items() if forest.tier == DEVICE or not len(forest)]:
            self._reach.drop_all(self.forests.pop(place))
        self._reusable.clear()
        self._pieces.clear()
        for medium, _ in self.forests:
            self._limits.note(spared(medium))

    def reset(self) -> None:
        """Expect another engine."""
        self.clear()
        self._tiers.reset()
        self._reusable.reset()
        self._unevicted.reset()
        self.footprint.reset()
        self._limits.reset()
        self.grouping.reset()
        self.layout.reset()
        self.block_size = self._device_block_size = None
        self._reach.has_tails = False

    def forest_of(self, event: BlockStored | BlockRemoved) -> Forest | None:
        """The blocks present where the event is about; None if there are none."""
        return self.forests.get(self.layout.place(event.medium, event.group_idx))

    def settle(self) -> None:
        """A batch, or a slice of one, is over."""
        self._measure()
        if self._rules.rule is not None:
            self.grouping.settle()
            if len(self.forests) > 1 and any(forest.tier != DEVICE for forest in self.forests.values()):
                self._limits.note(SLOWER_TIERS, lasting=True)

    def _measure(self) -> None:
        """Count what is held now."""
        size, total, most = self.block_size or 0, 0, 0
        for forest in self.forests.values():
            held = len(forest)
            total += held
            if held > most and forest.tier == DEVICE:
                most = held
        self.footprint.holds(most * size)
        self.tokens = total * size
        if self._rules.rule is not None or self.layout.is_radix:
            self.tokens = max(
                self.tokens, len(self.pages) * size, len(self._pieces) * _SMALL_PIECE, self._reusable.tokens
            )

    # Stored

    def store(self, event: BlockStored) -> None:
        """Apply a stored event. Raises `UntrustedEvents`."""
        group = event.group_idx or 0
        if (
            self.layout.is_radix is False
            and self._rules.is_plain(group, event.block_size)
            and event.medium in _DEVICE_NAMES
        ):
            # An engine with one group of full attention, whose layout is known: almost every event there is.
            forest, tokens = self.forests.get(("GPU", group)), tokens_of(event)
            if forest is not None and tokens is not None and event.block_hashes and event.extra_keys is not UNSET:
                ids = block_ids(event.block_hashes)
                self._stats.stored += len(ids)
                self._store_dense(forest, event, ids, tokens, parent_of(event))
                return
        self._store_any(event)

    def _store_any(self, event: BlockStored) -> None:
        kind = kind_of(event)
        if kind is None:
            self._stats.other_attention += 1
            self._limits.note(unknown_kind(event.kv_cache_spec_kind or ""), lasting=True)
            return
        bare = is_bare(event)
        if event.group_idx and event.kv_cache_spec_kind is None and not bare:
            raise UntrustedEvents("its attention groups cannot be distinguished")
        if self.layout.is_annotated and event.hides_keys:
            event = plain(event)
        elif event.is_annotated and not self.layout.is_annotated:
            self._take_for_pages()
        if self.layout.learn(event):
            self.clear()  # a connector published first
        if self.layout.is_tensorrt:
            self._limits.note(UNTRIED, lasting=True)
        place = self.layout.place(event.medium, event.group_idx)
        tier = tier_of(place[0])
        if tier == DEVICE and event.block_size > 0 and self.grouping.take(event, kind, place[1]):
            return
        tokens, ahead = (None, None) if bare else tokens_in(event, tier)
        forest = self.forests.get(place)
        if (tokens is None and not bare) or (forest is None and len(self.forests) >= MAX_PLACES):
            self._stats.misfits += 1
            self._limits.note(MISFITS)
            return
        if forest is None:
            forest = self.forests[place] = Forest(tier)
            self._reach.open(tier, self.forests.values())
        if tokens is None:
            ids = block_ids(event.block_hashes)
            self._blocks.store_copies(self.forests, place, ids)
            self._forget_oldest(place, ids, self.block_size or 1)
        else:
            self._store_tokens(forest, place, event, tokens, ahead)

    def _take_for_pages(self) -> None:
        """The blocks so far are pages of a radix tree, which the layout of their events did not show."""
        if self.forests.keys() - {("GPU", 0)}:
            self.clear()
        for forest in self.forests.values():
            blocks = [block for _, _, block in forest.below(None)]
            self.pages.stored(blocks, blocks, None)
            forest.copies.clear()

    def _store_tokens(
        self, forest: Forest, place: Place, event: BlockStored, tokens: bytes, ahead: list[bytes] | None
    ) -> None:
        """Store blocks whose tokens are known, each followed by those `ahead`, if it is of pairs."""
        ids, parent = block_ids(event.block_hashes), parent_of(event)
        if self.layout.is_radix:
            ids, parent = self.pages.named(event, ids, parent)
        if ahead is not None:
            self._rules.look_ahead_in_pairs()
            self._reusable.look_ahead(ids, ahead)
        self._stats.stored += len(ids)
        again: Sequence[int] = ()
        repeats = self.pages.repeats
        if self.layout.is_radix:
            again = self.pages.stored(ids, block_ids(event.block_hashes), event.medium)
        if self.pages.repeats > repeats:
            self._limits.note(EXTRA_KEYS, lasting=True)
        size = event.block_size
        whole = self._rules.specs[place[1]].block_size if forest.tier == DEVICE else size
        if size < whole and len(self._rules.specs) > 1:
            self._store_pieces(forest, event, ids, tokens, parent, whole)
            return
        if forest.tier == DEVICE:
            self.block_size = self._device_block_size = max(size, self._device_block_size or 0)
        elif self._device_block_size is None:
            self.block_size = max(size, self.block_size or 0)
        self._store_dense(forest, event, ids, tokens, parent)
        if again:
            self._blocks.drop_copies(forest, [block for block in again if block in forest.copies])
        self._forget_oldest(place, ids, size)
        if place in self._unevicted.silent:
            self._limits.note(store_only(place[0]), lasting=True)

    def _store_pieces(
        self, forest: Forest, event: BlockStored, ids: Sequence[int], tokens: bytes, parent: int | None, whole: int
    ) -> None:
        """Store blocks smaller than the group's, as far as they make whole ones."""
        self._reusable.linked(event, ids, parent, tokens)
        keys = event.extra_keys if isinstance(event.extra_keys, list) else None
        for made in self._pieces.add(ids, parent, tokens, event.block_size, whole, keys):
            key = keys_of_whole(made.keys, event.block_size, event.lora_name or None)
            ahead = event.lookahead
            piece = msgspec.structs.replace(
                event,
                block_size=whole,
                extra_keys=None if key is None else [key],
                lookahead_token_ids=None if ahead is None else ahead[made.last : made.last + 1],
            )
            self._store_dense(forest, piece, [made.block], made.tokens, made.parent)

    def _store_dense(
        self, forest: Forest, event: BlockStored, ids: Sequence[int], tokens: bytes, parent: int | None
    ) -> None:
        """Store blocks whose tokens are known in one of the forests."""
        reusable = self._reusable
        if event.lookahead:
            reusable.look_ahead(ids, [token_bytes(ahead) for ahead in event.lookahead], media_ahead(event))
        counts_copies = self._rules.counts_copies or bool(self.layout.is_radix)
        self._blocks.store(forest, event, ids, tokens, parent, counts_copies=counts_copies)

    def _forget_oldest(self, place: Place, ids: Sequence[int], size: int) -> None:
        """Keep a slower tier that publishes no evictions from growing for ever."""
        forest = self.forests[place]
        gone = self._unevicted.stored(place, ids, size) if forest.tier != DEVICE else ()
        if gone:
            self._limits.note(store_only(place[0]), lasting=True)
            for block in gone:
                forest.copies.pop(block, None)
            self._remove(place, [block for block in gone if block in forest])

    # Removed

    def evict(self, medium: str | None, group: int | None, hashes: Sequence[EngineHash]) -> None:
        """The engine published that blocks left a medium and group."""
        place = self.layout.place(medium, group)
        if tier_of(place[0]) == DEVICE and place[1] == (self._rules.primary or 0):
            self.footprint.evicted_tokens += len(hashes) * (self.block_size or 0)
        if place[0] != "GPU" and self._unevicted.evicts(place):
            self._limits.drop(store_only(place[0]))
        self._remove(place, hashes, medium)

    def _remove(self, place: Place, hashes: Sequence[EngineHash], medium: str | None = None) -> None:
        forest, reusable = self.forests.get(place), self._reusable
        left = block_ids(hashes)
        if self._rules.rule is not None and tier_of(place[0]) == DEVICE:
            reusable.removed(place[1], left)
            if place[1] == self._rules.primary:
                reusable.touch(left)
            elif forest is None:
                self._stats.removed += len(left)
                return
        if forest is None:
            self._stats.unknown_removed += len(hashes)
            return
        if len(self.pages):
            ambiguous = self.pages.ambiguous
            left = self.pages.removed(left, medium)
            reusable.touch(left)
            if self.pages.ambiguous > ambiguous:
                self._limits.note(SHARED_PAGES)
        if len(self._pieces) and tier_of(place[0]) == DEVICE:
            left = self._pieces.remove(left)
        self._blocks.remove(forest, left)
        self._tiers.flush()
