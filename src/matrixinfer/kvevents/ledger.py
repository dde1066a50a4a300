"""Engine blocks to token blocks: turns one engine's events into index operations.

An engine names its blocks by opaque hashes and chooses their size; the index names token blocks by their content. The
ledger is the only owner of engine hashes. It follows each chain of engine blocks (`forest`), cuts its tokens into token
blocks by position, and keeps in the index exactly the token blocks that a prompt can reach: those covered by an unbroken
path of present engine blocks from the root. For an engine block that begins before the end of a token block and ends
within the next one, the index also gets the tail, by which a lookup finds whether the whole engine block matches
(`TokenBlockProcessor.overhang`).

Two things are counted: engine copies per hash (a removed copy is not a removed block), and supports per token block
(the engine blocks `[a b]` and `[a c]` both support the token block `a`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
from msgspec import UNSET

from matrixinfer.blocks import TokenBlockProcessor, salt_parent, token_bytes
from matrixinfer.errors import MatrixInferError
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.fine import Pieces
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.groups import Kind, kind_of
from matrixinfer.kvevents.limits import (
    CHUNKED,
    FINE_STATES,
    MISFITS,
    ORPHANS,
    REUSES_LESS,
    SHARED_PAGES,
    SLOWER_TIERS,
    SPARSE_WINDOWS,
    UNLINKED,
    Limits,
    spared,
    store_only,
    unknown_kind,
)
from matrixinfer.kvevents.pages import Pages
from matrixinfer.kvevents.reusable import Reusable
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.stored import all_new, in_order, indexable, is_bare, is_reported_again, tokens_of_chunk
from matrixinfer.kvevents.supports import Supports
from matrixinfer.kvevents.tiers import DEVICE, Supported, Tiers, Unevicted, tier_of
from matrixinfer.kvevents.wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EngineHash,
    Event,
    block_ids,
    is_hash_of_tokens_alone,
    pairs_of,
    tokens_of,
)
from matrixinfer.kvevents.witness import Witness
from matrixinfer.traffic.history import RoutingHistory

SMALL_BLOCK = 16
"""Tokens per engine block below which events and memory grow out of proportion."""
MAX_TOKENS = 64_000_000
"""The most tokens that one engine can plausibly hold: a cache of that many takes some 10 TB."""
_MAX_PLACES = 16
_DEVICE_NAMES = ("GPU", None)
_SUPPORT_BYTES = 130
_UNEVICTED_BYTES = 100
_FEW_ORPHANS = 16
_RADIX_MEDIA = (None, "GPU", "CPU_PINNED", "DISK", "EXTERNAL")
_Place: TypeAlias = tuple[str, int]
"""A cache medium and an attention group."""


class UntrustedEvents(MatrixInferError):
    """The engine's events do not say what it holds. `reason` explains why, for operators."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, kw_only=True)
class LedgerStats:
    """Counts of what the events reported, in engine blocks unless stated otherwise."""

    stored: int = 0
    removed: int = 0
    clears: int = 0
    """AllBlocksCleared events."""
    copies: int = 0
    """Stored again while present."""
    reported_again: int = 0
    """Reported as stored because a request found them in the cache (vLLM's `kv_cache_report_mode`): not copies."""
    orphans: int = 0
    """Dropped because their parent was never seen."""
    unknown_removed: int = 0
    """Removed, but never seen."""
    ended: int = 0
    """Present but not indexed: their content depends on more than tokens, adapter and salt."""
    other_attention: int = 0
    """Events of attention groups that do not hold whole prefixes."""
    misfits: int = 0
    """Events whose tokens do not fit their blocks."""


class Ledger:
    """Applies one publisher's events to the index, under the endpoint name `pod`.

    `model` is the index's name for the engine's base model; blocks of an adapter go under the adapter's name.
    """

    def __init__(
        self,
        *,
        pod: str,
        model: str,
        blocks: TokenBlockProcessor,
        index: BlockIndex,
        history: RoutingHistory | None = None,
    ) -> None:
        self.pod = pod
        self.model = model
        self.stats = LedgerStats()
        self.block_size: int | None = None
        """Tokens per engine block, the largest if they differ: matches are rounded down to it. None before the first."""
        self.has_tails = False
        """Engine blocks and token blocks straddle each other, so lookups must ask for tails."""
        self.hides_salts = False
        """The events do not show a block's salt: a salted prompt looks like a plain one."""
        self.hides_adapters = False
        """The events do not show a block's adapter."""
        self._witness: Witness | None = None
        self._numbers_adapters = False  # events give adapters as numbers: their blocks are recognised, not indexed
        self._blocks = blocks
        self._history = history
        self.tiers = Tiers(pod, index, history)
        self.reusable = Reusable(pod, index, blocks)
        self._pieces = Pieces()
        self._pages = Pages()
        self._unevicted = Unevicted()
        self._limits = Limits()
        self._is_radix: bool | None = None  # SGLang's layout; None before the first event that shows it
        self._device_block_size: int | None = None
        self._stored_before = self._orphans_before = 0  # counts when everything was last cleared
        self._linked: set[int] = set()  # groups whose blocks the primary one has too
        self._strange: set[int] = set()  # groups whose blocks it has never had
        self._unlinked: dict[int, list[int]] = {}  # blocks of this batch in other groups
        self._forests: dict[_Place, Forest] = {}

    @property
    def limits(self) -> tuple[str, ...]:
        """What the events cannot tell, in plain words that name the remedy, the oldest first."""
        return self._limits.words

    @property
    def supports(self) -> Supports:
        """The supports of token blocks over all tiers."""
        return self.tiers.all

    @property
    def forests(self) -> Collection[Forest]:
        """The engine blocks present, by medium and attention group; for reading."""
        return self._forests.values()

    @property
    def drop_unit(self) -> int:
        """Tokens by which the engine cuts its hits, if it drops a block of them; 0 if that is not known."""
        reusable = self.reusable
        return reusable.specs[reusable.primary].block_size if reusable.primary is not None else 0

    @property
    def drops(self) -> bool:
        """Whether the engine is known to drop a block of every hit."""
        return self.reusable.drop > 0

    def drop_more(self) -> int:
        """Count with a drop in the group of full attention or, if that is done, in those of sliding windows as well.

        Returns the tokens that hits are cut by.
        """
        specs, primary = self.reusable.specs, self.reusable.primary
        sliding = [number for number, spec in specs.items() if spec.kind is Kind.SLIDING]
        return self._set_drops([primary or 0, *(sliding if self.drops else [])])

    def drop_nothing(self) -> int:
        """Count with no drop any more."""
        return self._set_drops([])

    def reuses_less(self, is_less: bool) -> None:
        """Whether answers have shown, again and again, that the engine reuses less than its events say it holds."""
        if is_less:
            self._limits.note(REUSES_LESS, lasting=True)
        else:
            self._limits.drop(REUSES_LESS)

    def _set_drops(self, groups: Sequence[int]) -> int:
        self.reusable.drops(groups)
        forest = self._primary_forest
        if self.reusable.rule is not None and forest is not None:
            self.reusable.touch(block for _, _, block in forest.below(None))
            self.reusable.settle(forest)
        return self.reusable.drop

    @property
    def is_observed(self) -> bool:
        """Whether a witness sees new blocks."""
        return self._witness is not None

    def observe(self, witness: Witness) -> None:
        """Show new blocks to `witness` from now on, and to nobody else."""
        self._witness = witness

    def stop_observing(self, witness: Witness) -> None:
        """Show `witness` nothing more; does nothing if another one has taken its place."""
        if self._witness is witness:
            self._witness = None

    def __len__(self) -> int:
        """The number of distinct engine blocks present."""
        return sum(map(len, self._forests.values()))

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of tables, tokens and the supports of token blocks."""
        forests = sum(forest.memory_bytes for forest in self._forests.values()) + self.reusable.memory_bytes
        forests += _UNEVICTED_BYTES * len(self._unevicted)
        return forests + 4 * (self.block_size or 0) * len(self) + _SUPPORT_BYTES * len(self.supports)

    def apply(self, *events: Event) -> None:
        """Apply events in order. Raises `UntrustedEvents`, after which the ledger must be cleared."""
        try:
            self._apply(events)
        except (IndexError, KeyError, ValueError) as error:
            # No consistent sequence of events does this; checking each event beforehand would slow down every feed.
            raise UntrustedEvents("its events contradict each other") from error

    def clear(self) -> None:
        """Forget every block: the engine holds nothing, or what it holds is no longer known."""
        self._forests.clear()
        self.tiers.clear()
        self.reusable.clear()
        self._pieces.clear()
        self._pages.clear()
        self._unevicted.clear()
        self._limits.clear()
        self._stored_before, self._orphans_before = self.stats.stored, self.stats.orphans

    def reset(self) -> None:
        """Expect another engine: clear, and forget block size and layout."""
        self.clear()
        self.tiers.reset()
        self.reusable.reset()
        self._forget_sent()
        self._unevicted.reset()
        self._limits.reset()
        self._linked.clear()
        self._strange.clear()
        self._is_radix = None
        self.block_size = self._device_block_size = None
        self.has_tails = self.hides_salts = self.hides_adapters = self._numbers_adapters = False

    def _apply(self, events: Sequence[Event]) -> None:
        blocks = max(len(self), len(self._pages))
        if max(blocks * (self.block_size or 0), len(self._pieces) * SMALL_BLOCK, self.reusable.tokens) > MAX_TOKENS:
            raise UntrustedEvents(f"it claims to hold more than {MAX_TOKENS} tokens")
        removed: list[EngineHash] = []
        place: tuple[str | None, int | None] = (None, None)
        for event in events if len(events) == 1 else self._ordered(events):
            if isinstance(event, BlockRemoved):
                # Engines evict block by block, with an event for each: adjacent removals are applied together.
                if removed and place != (event.medium, event.group_idx):
                    self._evict(place, removed)
                    removed = []
                place = (event.medium, event.group_idx)
                removed += event.block_hashes
                continue
            if removed:
                self._evict(place, removed)
                removed = []
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, AllBlocksCleared):
                self.stats.clears += 1
                self._clear_device()
                self._forget_sent()
        if removed:
            self._evict(place, removed)
        if self.reusable.rule is not None:
            self.reusable.settle(self._primary_forest)
            if self._unlinked:
                self._check_links()
            if len(self._forests) > 1 and any(forest.tier != DEVICE for forest in self._forests.values()):
                self._limits.note(SLOWER_TIERS, lasting=True)

    def _ordered(self, events: Sequence[Event]) -> Sequence[Event]:
        """The events in the order in which they make sense, once the groups that they are about are known."""
        stored = [event for event in events if isinstance(event, BlockStored)]
        if not stored:
            return events
        self._learn_groups(stored)
        return in_order(events, stored)

    @property
    def _primary_forest(self) -> Forest | None:
        """The device's blocks of the group whose tokens are known."""
        return self._forests.get(("GPU", self.reusable.primary or 0))

    def _clear_device(self) -> None:
        """The engine published a reset. One of the device need not reach the slower tiers, which keep their blocks."""
        slower = {place: forest for place, forest in self._forests.items() if forest.tier != DEVICE and len(forest)}
        if self._is_radix or not slower:
            self.clear()
            return
        for place in [place for place in self._forests if place not in slower]:
            self._drop(place)
        self.reusable.clear()
        self._pieces.clear()
        for medium, _ in slower:
            self._limits.note(spared(medium))

    def _check_links(self) -> None:
        """See whether the blocks of other groups, as this batch left them, are among those of the primary one."""
        forest = self._primary_forest
        for group, blocks in self._unlinked.items():
            if forest is not None and any(block in forest for block in blocks):
                self._linked.add(group)
            elif self.reusable.is_rooted:
                self._strange.add(group)
        self._unlinked.clear()
        self._strange -= self._linked
        if self._strange:
            self._limits.note(UNLINKED, lasting=True)
        else:
            self._limits.drop(UNLINKED)

    def _forget_sent(self) -> None:
        """Forget what was sent to the engine: it holds nothing."""
        if self._history is not None:
            self._history.forget(self.pod)

    # Stored

    def _store(self, event: BlockStored) -> None:
        group = event.group_idx or 0
        if (
            self._is_radix is False
            and self.reusable.is_plain(group, event.block_size)
            and event.medium in _DEVICE_NAMES
        ):
            # An engine with one group of full attention, whose layout is known: almost every event there is.
            forest, tokens = self._forests.get(("GPU", group)), tokens_of(event)
            if forest is not None and tokens is not None and event.block_hashes and not event.hides_keys:
                ids = block_ids(event.block_hashes)
                self.stats.stored += len(ids)
                self._store_dense(forest, event, ids, tokens, _parent_of(event))
                return
        self._store_any(event)

    def _store_any(self, event: BlockStored) -> None:
        kind = kind_of(event)
        if kind is None:
            self.stats.other_attention += 1
            self._limits.note(unknown_kind(event.kv_cache_spec_kind or ""), lasting=True)
            return
        bare = is_bare(event)
        if event.group_idx and event.kv_cache_spec_kind is None and not bare:
            raise UntrustedEvents("its attention groups cannot be distinguished")
        if event.hides_keys:
            self._note_layout(event)
        if self._is_radix is not False:
            self._note_radix(event)
        place = self._place(event.medium, event.group_idx)
        tier = tier_of(place[0])
        if tier == DEVICE and event.block_size > 0 and self._is_of_another_group(event, kind, place[1]):
            return
        tokens, ahead = (None, None) if bare else _tokens_of(event, tier)
        forest = self._forests.get(place)
        if (tokens is None and not bare) or (forest is None and len(self._forests) >= _MAX_PLACES):
            self.stats.misfits += 1
            self._limits.note(MISFITS)
            return
        if forest is None:
            forest = self._forests[place] = Forest(tier)
            self.tiers.open(tier, self._present)
        if tokens is None:
            self._store_copies(forest, place, block_ids(event.block_hashes))
        else:
            self._store_tokens(forest, place, event, tokens, ahead)

    def _store_tokens(
        self, forest: Forest, place: _Place, event: BlockStored, tokens: bytes, ahead: list[bytes] | None
    ) -> None:
        """Store blocks whose tokens are known, each followed by those `ahead`, if it is of pairs."""
        ids, parent = block_ids(event.block_hashes), _parent_of(event)
        if self._is_radix:
            ids, parent = self._pages.named(event, ids, parent)
        if ahead is not None:
            self.reusable.look_ahead_in_pairs()
            self.reusable.look_ahead(ids, ahead)
        self.stats.stored += len(ids)
        again = self._pages.stored(ids, event.medium) if self._is_radix else ()
        size = event.block_size
        whole = self.reusable.specs[place[1]].block_size if forest.tier == DEVICE else size
        if size < whole and len(self.reusable.specs) > 1:
            self._store_pieces(forest, event, ids, tokens, parent, whole)
            return
        if forest.tier == DEVICE:
            self.block_size = self._device_block_size = max(size, self._device_block_size or 0)
        elif self._device_block_size is None:
            self.block_size = max(size, self.block_size or 0)
        self._store_dense(forest, event, ids, tokens, parent)
        if again:
            self._drop_copies(forest, [block for block in again if block in forest.copies])
        if forest.tier != DEVICE:
            self._forget_oldest(forest, place, ids, size)
            if place in self._unevicted.silent:
                self._limits.note(store_only(place[0]), lasting=True)

    def _store_pieces(
        self, forest: Forest, event: BlockStored, ids: Sequence[int], tokens: bytes, parent: int | None, whole: int
    ) -> None:
        """Store blocks smaller than the group's, as far as they make whole ones."""
        self.reusable.linked(ids, parent, event.block_size)
        for made in self._pieces.add(ids, parent, tokens, event.block_size, whole):
            keys = event.extra_keys if isinstance(event.extra_keys, list) else None
            piece = msgspec.structs.replace(
                event,
                block_size=whole,
                extra_keys=None if keys is None else keys[made.position : made.position + 1],
            )
            self._store_dense(forest, piece, [made.block], made.tokens, made.parent)

    def _store_dense(
        self, forest: Forest, event: BlockStored, ids: Sequence[int], tokens: bytes, parent: int | None
    ) -> None:
        """Store blocks whose tokens are known, and count copies of those that are present."""
        if event.lookahead:
            self.reusable.look_ahead(ids, [token_bytes(ahead) for ahead in event.lookahead])
        above = None if parent is None else forest.run_of(parent)
        doubtful = event.hides_keys and ids[0] in forest
        if not doubtful and all_new(forest, parent, above, ids):
            self._append(forest, event, 0, ids, tokens, parent, above)
            return
        counts_copies = self.reusable.rule is not None or self.reusable.drop or self._is_radix
        if not counts_copies and is_reported_again(forest, event, ids):
            self.stats.reported_again += len(ids)
            return
        for first, last in self._new_stretches(forest, event, parent, ids):
            stretch = tokens[first * event.block_size * 4 : last * event.block_size * 4]
            before = ids[first - 1] if first else parent
            above = None if before is None else forest.run_of(before)
            self._append(forest, event, first, ids[first:last], stretch, before, above)

    def _place(self, medium: str | None, group: int | None) -> _Place:
        """The place of a block. SGLang finds a prompt's pages on any medium: each is one more place of a page."""
        if medium is None or (self._is_radix and medium in _RADIX_MEDIA):
            return "GPU", group or 0
        return medium, group or 0

    def _is_of_another_group(self, event: BlockStored, kind: Kind, group: int) -> bool:
        """Store an event on the device in its group, unless that is the primary one."""
        reusable = self.reusable
        if not reusable.is_plain(group, event.block_size):
            if group not in reusable.specs and len(reusable.specs) >= _MAX_PLACES:
                self.stats.misfits += 1
                self._limits.note(MISFITS)
                return True
            self._learn(event, kind, group)
        if group == reusable.primary and reusable.is_rooted:
            return False
        is_dense = tokens_of(event) is not None
        ids = block_ids(event.block_hashes)
        parent = _parent_of(event) if is_dense else None
        if is_dense:
            reusable.linked(ids, parent, event.block_size)
        reusable.stored(group, ids, parent)
        if group != reusable.primary or not is_dense:
            if group == reusable.primary:
                self._limits.note(SPARSE_WINDOWS, lasting=True)
            elif ids and group not in self._linked:
                self._unlinked.setdefault(group, []).extend(ids)
            self.stats.stored += len(ids)
            return True
        return False

    def _learn_groups(self, events: Sequence[BlockStored]) -> None:
        """Learn of new groups first: what an event of one group means may depend on which others there are."""
        for event in events:
            if len(self.reusable.specs) >= _MAX_PLACES:
                return
            if event.group_idx and event.group_idx not in self.reusable.specs:
                kind = kind_of(event)
                if kind is not None and event.block_size > 0 and tier_of(event.medium or "GPU") == DEVICE:
                    self._learn(event, kind, event.group_idx)

    def _learn(self, event: BlockStored, kind: Kind, group: int) -> None:
        """Learn what an event on the device says of its group."""
        reusable = self.reusable
        before = reusable.primary
        forest = None if before is None else self._primary_forest
        reusable.learn(group, kind, event.block_size, event.window, forest)
        self._note_groups()
        if reusable.primary != before and forest is not None:
            self._drop(("GPU", before or 0))
        if reusable.primary != before and reusable.is_rooted:
            self._limits.drop(SPARSE_WINDOWS)

    def _note_groups(self) -> None:
        """Note what is not published of the attention groups."""
        for spec in self.reusable.specs.values():
            if spec.kind is Kind.CHUNKED and spec.span is None:
                self._limits.note(CHUNKED, lasting=True)
            if spec.kind is Kind.MAMBA and spec.has_fine_blocks:
                self._limits.note(FINE_STATES, lasting=True)

    def _note_orphans(self, count: int) -> None:
        """Count blocks that were dropped because their parents are unknown."""
        self.stats.orphans += count
        orphans = self.stats.orphans - self._orphans_before
        if orphans > _FEW_ORPHANS and orphans * 50 > self.stats.stored - self._stored_before:
            self._limits.note(ORPHANS)

    def _drop(self, place: _Place) -> None:
        """Another group's tokens are known from now on: forget those of `place`, whose blocks its group still counts."""
        forest = self._forests.pop(place, None)
        if forest is not None:
            for run, position, block in forest.below(None):
                if block not in forest.cut:
                    self._unsupport(forest, run, position, position + 1)
            self.tiers.flush()

    def _note_layout(self, event: BlockStored) -> None:
        """Note what a layout without extra keys hides. Raises `UntrustedEvents`."""
        self.hides_salts = True
        self._numbers_adapters = self._numbers_adapters or event.lora_id is not None
        self.hides_adapters = event.lora_name is UNSET and not self._numbers_adapters
        if is_hash_of_tokens_alone(event):
            raise UntrustedEvents("its blocks are hashed without what precedes them")

    def _note_radix(self, event: BlockStored) -> None:
        """Note whether the layout is SGLang's. Connectors leave out fields too, so only its own media count at first."""
        if not event.is_of_radix_tree:
            if self._is_radix:
                self.clear()  # a connector published first
            self._is_radix = False
        elif event.medium in _RADIX_MEDIA:
            self._is_radix = True

    def _new_stretches(
        self, forest: Forest, event: BlockStored, parent: int | None, ids: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Yield stretches [first, last) of blocks that are not present yet, and count copies of those that are."""
        first = 0
        stretch: set[int] = set()
        for position, block in enumerate(ids):
            present = block in forest
            if not present and block not in stretch:
                stretch.add(block)
                continue
            if first < position:
                yield first, position  # the caller stores them before the next step
            first = position + 1
            stretch.clear()
            if present or block in forest:
                if event.hides_keys:
                    self._check_parent(forest, ids[position - 1] if position else parent, block)
                forest.copies[block] = forest.copies.get(block, 0) + 1
                self.stats.copies += 1
        if first < len(ids):
            yield first, len(ids)

    def _check_parent(self, forest: Forest, parent: int | None, block: int) -> None:
        """A block that is stored again must follow the same block as before. Raises `UntrustedEvents`."""
        run = forest.run_of(block)
        if run is None:
            return
        position = run.position(block)
        if parent != (run[position - 1] if position else run.parent):
            raise UntrustedEvents("one hash names blocks that follow different prefixes")

    def _append(
        self,
        forest: Forest,
        event: BlockStored,
        first: int,
        ids: Sequence[int],
        tokens: bytes,
        parent: int | None,
        above: Run | None,
    ) -> None:
        """Store new blocks, the event's from position `first`, that follow `parent` (None: the root) in the run `above`."""
        if parent is not None and above is None and parent not in forest.ended:
            self._note_orphans(len(ids))
            return
        usable, salt = indexable(event, first, len(ids), at_root=parent is None)
        salt = event.salt or salt
        if parent in forest.ended or (salt is not None and self._blocks.scheme == "block"):
            usable = 0
        if usable < len(ids):
            forest.ended.update(ids[usable:])
            self.stats.ended += len(ids) - usable
            ids, tokens = ids[:usable], tokens[: usable * event.block_size * 4]
        if not ids:
            return
        if above is None or parent is None:
            run = self._root(event, salt)
        elif above.block_size == event.block_size and above.ends_with(parent):
            run = above
        else:
            run = above.branch(above.position(parent), event.block_size)
        position = len(run)
        forest.extend(run, ids, tokens)
        if self._witness is not None:
            self._witness.see(run, position)
        self._reach(forest, run, position, ids, parent)

    def _reach(self, forest: Forest, run: Run, position: int, ids: Sequence[int], parent: int | None) -> None:
        """Support the new blocks `ids`, from `position` of a run on, unless `parent` cannot be reached."""
        if parent in forest.cut:
            forest.cut.update(ids)
            return
        self._support(forest, run, position, len(run))
        if forest.cut:
            self._rejoin(forest, ids)

    def _store_copies(self, forest: Forest, place: _Place, ids: Sequence[int]) -> None:
        """Store off-loaded blocks that are named without their tokens, which are known from another tier."""
        # Connectors may leave out the group.
        others = sorted(
            (at[1] != place[1], at != place, at) for at, other in self._forests.items() if other is not forest
        )
        sources = [self._forests[at] for _, _, at in others]
        self.stats.stored += len(ids)
        for block in ids:
            if block in forest:
                forest.copies[block] = forest.copies.get(block, 0) + 1
                self.stats.copies += 1
                continue
            source = next((run for other in sources if (run := other.run_of(block)) is not None), None)
            position = 0 if source is None else source.position(block)
            parent = None if source is None else source[position - 1] if position else source.parent
            above = None if parent is None else forest.run_of(parent)
            if source is None or (parent is not None and above is None):
                self._note_orphans(1)
                continue
            run = source.like(above, parent)
            start = len(run)
            forest.extend(run, [block], source.tokens_of(position))
            self._reach(forest, run, start, [block], parent)
        if forest.tier != DEVICE:
            self._forget_oldest(forest, place, ids, self.block_size or 1)

    def _forget_oldest(self, forest: Forest, place: _Place, ids: Sequence[int], size: int) -> None:
        """Keep a slower tier that publishes no evictions from growing for ever."""
        gone = self._unevicted.stored(place, ids, size)
        if gone:
            self._limits.note(store_only(place[0]), lasting=True)
            for block in gone:
                forest.copies.pop(block, None)
            self._remove(place, [block for block in gone if block in forest])

    def _root(self, event: BlockStored, salt: str | None) -> Run:
        return Run(
            self._blocks,
            model=event.lora_name or self.model,
            block_size=event.block_size,
            seed=None if salt is None else salt_parent(salt),
        )

    def _rejoin(self, forest: Forest, ids: Sequence[int]) -> None:
        """Support the blocks that were cut off while one of `ids` was absent."""
        for block in ids:
            for run, position, child in forest.below(block):
                forest.cut.discard(child)
                self._support(forest, run, position, position + 1)

    def _support(self, forest: Forest, run: Run, first: int, last: int) -> None:
        """Support the token blocks of the blocks [first, last) of a run, which can be reached."""
        if self.reusable.rule is not None and forest.tier == DEVICE:
            self.reusable.touch(run[position] for position in range(first, last))
        for model, names, parent in _supported(run, first, last):
            self.tiers.add(forest.tier, model, names, parent)
        self.has_tails = self.has_tails or run.has_tails

    def _present(self, tier: int) -> Iterator[Supported]:
        """The blocks on tiers up to `tier` that can be reached, parents first."""
        for forest in self._forests.values():
            if forest.tier <= tier:
                for run, position, block in forest.below(None):
                    if block not in forest.cut:
                        yield from _supported(run, position, position + 1)

    # Removed

    def _evict(self, at: tuple[str | None, int | None], hashes: Sequence[EngineHash]) -> None:
        """The engine published that blocks left a medium and group."""
        place = self._place(*at)
        if place[0] != "GPU" and self._unevicted.evicts(place):
            self._limits.drop(store_only(place[0]))
        self._remove(place, hashes, at[0])

    def _remove(self, place: _Place, hashes: Sequence[EngineHash], medium: str | None = None) -> None:
        forest = self._forests.get(place)
        left = block_ids(hashes)
        if self.reusable.rule is not None and tier_of(place[0]) == DEVICE:
            self.reusable.removed(place[1], left)
            if place[1] == self.reusable.primary:
                self.reusable.touch(left)
            elif forest is None:
                self.stats.removed += len(left)
                return
        if forest is None:
            self.stats.unknown_removed += len(hashes)
            return
        if len(self._pages):
            ambiguous = self._pages.ambiguous
            left = self._pages.removed(left, medium)
            self.reusable.touch(left)
            if self._pages.ambiguous > ambiguous:
                self._limits.note(SHARED_PAGES)
        shrunk: dict[Run, None] = {}
        if len(self._pieces) and tier_of(place[0]) == DEVICE:
            left = self._pieces.remove(left)
        if not (forest.copies.keys().isdisjoint(left) and forest.ended.isdisjoint(left)):
            left = self._drop_copies(forest, left)
        present = len(left)
        if not forest.cut:
            # Blocks named root first are the end of their run once those after them have gone.
            left = forest.pop_last(forest.pop_last(left, shrunk)[::-1], shrunk)
        self.stats.removed += present - len(left)
        for run in shrunk:
            self._unsupport(forest, run, len(run), run.recorded)
            run.truncate()
        for block in left:
            self._remove_inner(forest, block)
        self.tiers.flush()

    def _drop_copies(self, forest: Forest, blocks: Sequence[int]) -> list[int]:
        """Remove one copy of each block with several, and blocks that are not indexed; return the others."""
        left, copies = [], forest.copies
        for block in blocks:
            if block in copies:
                copies[block] -= 1
                if not copies[block]:
                    del copies[block]
            elif block in forest.ended:
                forest.ended.discard(block)
            else:
                left.append(block)
        self.stats.removed += len(blocks) - len(left)
        return left

    def _remove_inner(self, forest: Forest, block: int) -> None:
        """Remove a block that others follow, or that is cut off: what follows it cannot be reached."""
        run = forest.run_of(block)
        if run is None:
            self.stats.unknown_removed += 1
            return
        self.stats.removed += 1
        if not run.ends_with(block):
            forest.split(run, run.position(block))
        last = len(run) - 1
        if block in forest.cut:
            forest.cut.discard(block)
        else:
            for below, position, child in forest.below(block):
                forest.cut.add(child)
                self._unsupport(forest, below, position, position + 1)
                if self.reusable.rule is not None:
                    self.reusable.touch((child,))
            self._unsupport(forest, run, last, last + 1)
        forest.drop_last(run, block)
        run.truncate()

    def _unsupport(self, forest: Forest, run: Run, first: int, last: int) -> None:
        """Drop the supports of the blocks [first, last) of a run, which can no longer be reached."""
        if run.has_tails:
            self.tiers.remove(forest.tier, run.model, [tail for _, tail in run.tails(first, last)])
        _, names = run.completed(first, last)
        self.tiers.remove(forest.tier, run.model, names[::-1])


def _supported(run: Run, first: int, last: int) -> Iterator[Supported]:
    """The token blocks and tails that the blocks [first, last) of a run support."""
    parent, names = run.completed(first, last)
    yield run.model, names, parent
    if run.has_tails:
        for before, tail in run.tails(first, last):
            yield run.model, [tail], before


def _tokens_of(event: BlockStored, tier: int) -> tuple[bytes | None, list[bytes] | None]:
    """The tokens of an event's blocks, None if they do not fit; and those after each block, if it is of pairs."""
    tokens = tokens_of(event) if event.block_size > 0 and event.block_hashes else None
    if tokens is None and tier != DEVICE:
        tokens = tokens_of_chunk(event)
    pairs = None if tokens is not None else pairs_of(event)
    return (tokens, None) if pairs is None else pairs


def _parent_of(event: BlockStored) -> int | None:
    return None if event.parent_block_hash is None else block_ids([event.parent_block_hash])[0]
