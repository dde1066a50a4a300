"""Engine blocks to token blocks: turns one engine's events into index operations.

An engine names its blocks by opaque hashes and chooses their size; the index names token blocks by their content. The
ledger is the only owner of engine hashes. It takes batches, and has others do the rest::

    event_reader    one event: the blocks that it stores or removes, and where
      layout        what the engine's events show, and what they hide
      grouping      attention groups other than the primary one, whose blocks are indexed
    engine_blocks   chains of blocks per medium and group (forest, run), and their copies
    reach           the token blocks that a prompt can reach, in the index (supports, tiers)
    reusable        which of those an engine reuses, where groups or tokens after a block decide it (ends in the index)
      rules         what its groups are, and what it drops of each hit
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.counts import LedgerStats, Orphans, UntrustedEvents
from matrixinfer.kvevents.engine_blocks import EngineBlocks
from matrixinfer.kvevents.event_reader import EventReader
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.groups import Kind
from matrixinfer.kvevents.limits import REUSES_LESS, Limits, unknown_event
from matrixinfer.kvevents.media_chain import See
from matrixinfer.kvevents.reach import Reach
from matrixinfer.kvevents.reusable import Reusable
from matrixinfer.kvevents.slices import slices
from matrixinfer.kvevents.stored import in_order
from matrixinfer.kvevents.supports import Supports
from matrixinfer.kvevents.tiers import Tiers
from matrixinfer.kvevents.wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EngineHash,
    Event,
)
from matrixinfer.kvevents.witness import Witness
from matrixinfer.traffic.history import RoutingHistory

SMALL_BLOCK = 16
"""Tokens per engine block below which events and memory grow out of proportion."""
MAX_TOKENS = 64_000_000
"""The most tokens that one engine can plausibly hold: a cache of that many takes some 10 TB."""
_SUPPORT_BYTES = 130


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
        self.tiers = Tiers(pod, index, history)
        self.reusable = Reusable(pod, model, index, blocks)
        self.rules = self.reusable.rules
        self._history = history
        self._limits = Limits()
        self._reach = Reach(self.tiers, self.reusable)
        self._blocks = EngineBlocks(
            model=model, blocks=blocks, reach=self._reach, stats=self.stats, orphans=Orphans(self.stats, self._limits)
        )
        self._reader = EventReader(
            reach=self._reach,
            reusable=self.reusable,
            tiers=self.tiers,
            blocks=self._blocks,
            stats=self.stats,
            limits=self._limits,
        )
        self.footprint = self._reader.footprint
        # Plain attributes, because every decision reads them of every endpoint.
        self.block_size: int | None = None
        """Tokens per engine block, the largest if they differ: matches are rounded down to it. None before the first."""
        self.limits: tuple[str, ...] = ()
        """What the events cannot tell, in plain words that name the remedy, the oldest first."""
        self.is_exact = True
        """Whether the events show all that decides what the engine reuses."""
        self.has_tails = False
        """Engine blocks and token blocks straddle each other, so lookups must ask for tails."""
        self.hides_salts = False
        """The events do not show a block's salt: a salted prompt looks like a plain one."""
        self.hides_adapters = False
        """The events do not show a block's adapter."""
        self.changes = 0
        """Counts how often anything here may have changed, but for the blocks and the footprint."""

    # What is known

    def _show(self) -> None:
        """Bring the attributes up to date."""
        layout = self._reader.layout
        self.block_size, self.has_tails = self._reader.block_size, self._reach.has_tails
        self.hides_salts, self.hides_adapters = layout.hides_salts, layout.hides_adapters
        self.limits = self._limits.words
        self.is_exact = not (self.hides_salts or self.hides_adapters or self.limits)
        self.changes += 1

    @property
    def supports(self) -> Supports:
        """The supports of token blocks over all tiers."""
        return self.tiers.all

    @property
    def forests(self) -> Collection[Forest]:
        """The engine blocks present, by medium and attention group; for reading."""
        return self._reader.forests.values()

    @property
    def drop_unit(self) -> int:
        """Tokens by which the engine cuts its hits, if it drops a block of them; 0 if that is not known."""
        return self.rules.unit

    def stored_of(self, tokens: int) -> int:
        """How many of a prompt's first tokens are in blocks that every group of the engine stores."""
        unit = self.rules.unit or self.block_size
        return max(0, tokens - self.rules.lookahead) // unit * unit if unit else 0

    @property
    def drops(self) -> bool:
        """Whether the engine is known to drop a block of every hit."""
        return self.rules.drop > 0

    @property
    def is_observed(self) -> bool:
        """Whether a witness sees new blocks."""
        return self._blocks.witness is not None

    def __len__(self) -> int:
        """The number of distinct engine blocks present."""
        return self._reader.count

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of tables, tokens and the supports of token blocks."""
        supports = _SUPPORT_BYTES * len(self.supports)
        return self._reader.memory_bytes + self.reusable.memory_bytes + supports

    # What others have learnt

    def drop_more(self) -> int:
        """Count with a drop in the group of full attention or, if that is done, in those of sliding windows as well.

        Returns the tokens that hits are cut by.
        """
        specs, primary = self.rules.specs, self.rules.primary
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
        self._show()

    def _set_drops(self, groups: Sequence[int]) -> int:
        self.reusable.drops(groups)
        self._reader.grouping.note_drops()
        self._show()
        forest = self._reader.grouping.primary_forest
        if self.rules.rule is not None and forest is not None:
            self.reusable.touch(block for _, _, block in forest.below(None))
            self.reusable.settle(forest)
        return self.rules.drop

    def observe(self, witness: Witness) -> None:
        """Show new blocks to `witness` from now on, and to nobody else."""
        self._blocks.witness = witness

    def see_media(self, see: See | None) -> None:
        """Show every chain with media that is stored from now on to `see`; None ends that."""
        self._blocks.media_seen = see

    def stop_observing(self, witness: Witness) -> None:
        """Show `witness` nothing more; does nothing if another one has taken its place."""
        if self._blocks.witness is witness:
            self._blocks.witness = None

    # Events

    def apply(self, *events: Event) -> None:
        """Apply events in order. Raises `UntrustedEvents`, after which the ledger must be cleared."""
        self._apply_some(events)
        if self.rules.rule is not None:
            self._end()

    def _apply_some(self, events: Sequence[Event]) -> None:
        try:
            self._apply(events)
        except (IndexError, KeyError, ValueError) as error:
            # No consistent sequence of events does this; checking each event beforehand would slow down every feed.
            raise UntrustedEvents("its events contradict each other") from error
        finally:
            self._show()

    def applying(self, events: Sequence[Event]) -> Iterator[None]:
        """Apply events as `apply` does, slice by slice. After each one the index is as if no more had been published."""
        for part in slices(self._ordered(events), self._reader.forest_of):
            self._apply_some(part)
            yield
        if self.rules.rule is not None:
            self._end()

    def _end(self) -> None:
        """A batch of an engine with several groups is over."""
        if self._reader.grouping.check_links():
            self._show()

    def skip(self, kind: str) -> None:
        """The engine published an event of a type that is not known here."""
        self._limits.note(unknown_event(kind), lasting=True)
        self._show()

    def clear(self) -> None:
        """Forget every block: the engine holds nothing, or what it holds is no longer known."""
        self._reader.clear()
        self._show()

    def reset(self) -> None:
        """Expect another engine: clear, and forget block size, layout and whether it drops blocks."""
        self.start_over()
        self.rules.forget_drops()
        self._show()

    def start_over(self) -> None:
        """Read the same engine's history once more: clear, and learn block size and layout again."""
        self._reader.reset()
        self._forget_sent()
        self._show()

    def _apply(self, events: Sequence[Event]) -> None:
        reader = self._reader
        if reader.tokens > MAX_TOKENS:
            raise UntrustedEvents(f"it claims to hold more than {MAX_TOKENS} tokens")
        removed: list[EngineHash] = []
        medium: str | None = None
        group: int | None = None
        for event in events if len(events) == 1 else self._ordered(events):
            if isinstance(event, BlockRemoved):
                # Engines evict block by block, with an event for each: adjacent removals are applied together.
                if removed and (event.medium != medium or event.group_idx != group):
                    reader.evict(medium, group, removed)
                    removed = []
                medium, group = event.medium, event.group_idx
                removed += event.block_hashes
                continue
            if removed:
                reader.evict(medium, group, removed)
                removed = []
            if isinstance(event, BlockStored):
                reader.store(event)
            elif isinstance(event, AllBlocksCleared):
                self.stats.clears += 1
                self._clear_device()
                self._forget_sent()
        if removed:
            reader.evict(medium, group, removed)
        reader.settle()

    def _ordered(self, events: Sequence[Event]) -> Sequence[Event]:
        """The events in the order in which they make sense, once the groups that they are about are known."""
        stored = [event for event in events if isinstance(event, BlockStored)]
        if not stored:
            return events
        self._reader.grouping.learn_new(stored)
        return in_order(events, stored)

    def _clear_device(self) -> None:
        self._reader.clear_device()

    def _forget_sent(self) -> None:
        """Forget what was sent to the engine: it holds nothing."""
        if self._history is not None:
            self._history.forget(self.pod)
