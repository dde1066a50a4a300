"""The engine blocks that one engine holds: stored, stored again, removed.

Engine copies are counted per hash: a removed copy is not a removed block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from matrixinfer.blocks import TokenBlockProcessor, salt_parent
from matrixinfer.kvevents.counts import LedgerStats, Orphans, UntrustedEvents
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.media_chain import See, chain_of
from matrixinfer.kvevents.reach import Reach
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.stored import all_new, indexable, is_reported_again
from matrixinfer.kvevents.tiers import Place
from matrixinfer.kvevents.wire import BlockStored
from matrixinfer.kvevents.witness import Witness


class EngineBlocks:
    """Adds blocks to forests and removes them, and has `reach` support what can be reached.

    `model` is the index's name for the engine's base model; blocks of an adapter go under the adapter's name.
    """

    def __init__(
        self, *, model: str, blocks: TokenBlockProcessor, reach: Reach, stats: LedgerStats, orphans: Orphans
    ) -> None:
        self.witness: Witness | None = None
        """Sees new blocks."""
        self.media_seen: See | None = None
        """Sees every chain with media that is stored, again or as a hit as well."""
        self._model = model
        self._blocks = blocks
        self._reach = reach
        self._stats = stats
        self.orphans = orphans

    def store(
        self,
        forest: Forest,
        event: BlockStored,
        ids: Sequence[int],
        tokens: bytes,
        parent: int | None,
        *,
        counts_copies: bool,
    ) -> None:
        """Store blocks whose tokens are known, and count copies of those that are present.

        `counts_copies` says that whatever is stored again is a copy, and never a hit that is reported.
        """
        above = None if parent is None else forest.run_of(parent)
        doubtful = event.hides_keys and ids[0] in forest
        if not doubtful and all_new(forest, parent, above, ids):
            self._append(forest, event, 0, ids, tokens, parent, above)
            self._show_media(forest, ids)
            return
        if not counts_copies and is_reported_again(forest, event, ids):
            self._stats.reported_again += len(ids)
            self._show_media(forest, ids)
            return
        for first, last in self._new_stretches(forest, event, parent, ids):
            stretch = tokens[first * event.block_size * 4 : last * event.block_size * 4]
            before = ids[first - 1] if first else parent
            above = None if before is None else forest.run_of(before)
            self._append(forest, event, first, ids[first:last], stretch, before, above)
        self._show_media(forest, ids)

    def _show_media(self, forest: Forest, ids: Sequence[int]) -> None:
        """Show the chain that ends with the last of `ids` which is present, if anyone wants to see it."""
        if self.media_seen is None:
            return
        block = next((block for block in reversed(ids) if block in forest), None)
        run = None if block is None else forest.run_of(block)
        if block is not None and run is not None:
            chain = chain_of(forest, run, run.position(block))
            if chain is not None:
                self.media_seen(chain)

    def store_copies(self, forests: Mapping[Place, Forest], place: Place, ids: Sequence[int]) -> None:
        """Store off-loaded blocks that are named without their tokens, which are known from another of the `forests`."""
        forest = forests[place]
        # Connectors may leave out the group.
        others = sorted((at[1] != place[1], at) for at in forests if at != place)
        sources = [forests[at] for _, at in others]
        self._stats.stored += len(ids)
        for block in ids:
            if block in forest:
                self._count_copy(forest, block)
                continue
            source = next((run for other in sources if (run := other.run_of(block)) is not None), None)
            position = 0 if source is None else source.position(block)
            parent = None if source is None else source[position - 1] if position else source.parent
            above = None if parent is None else forest.run_of(parent)
            if source is None or (parent is not None and above is None):
                self.orphans.drop(1)
                continue
            run = source.like(above, parent)
            start = len(run)
            forest.extend(run, [block], source.tokens_of(position), source.media_of(position))
            self._reach.add(forest, run, start, [block], parent)

    def remove(self, forest: Forest, blocks: Sequence[int]) -> None:
        """Remove one copy of each block."""
        shrunk: dict[Run, None] = {}
        if not (forest.copies.keys().isdisjoint(blocks) and forest.ended.isdisjoint(blocks)):
            blocks = self.drop_copies(forest, blocks)
        present = len(blocks)
        if not forest.cut:
            blocks = forest.pop_last(blocks, shrunk)
            if len(blocks) > 1:  # named root first, they are the end of their run once those after them have gone
                blocks = forest.pop_last(blocks[::-1], shrunk)
        self._stats.removed += present - len(blocks)
        for run in shrunk:
            self._reach.drop_end(forest, run)
        for block in forest.last_first(blocks) if len(blocks) > 1 else blocks:
            self._remove_inner(forest, block)

    def drop_copies(self, forest: Forest, blocks: Sequence[int]) -> list[int]:
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
        self._stats.removed += len(blocks) - len(left)
        return left

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
                    _check_parent(forest, ids[position - 1] if position else parent, block)
                self._count_copy(forest, block)
        if first < len(ids):
            yield first, len(ids)

    def _count_copy(self, forest: Forest, block: int) -> None:
        forest.copies[block] = forest.copies.get(block, 0) + 1
        self._stats.copies += 1

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
            self.orphans.drop(len(ids))
            return
        count = len(ids)
        usable, salt, media = indexable(event, first, count, at_root=parent is None)
        salt = event.salt or salt
        if media and self._blocks.scheme == "block":
            usable, media = media[0][0] // event.block_size, ()
        if parent in forest.ended or (salt is not None and self._blocks.scheme == "block"):
            usable = 0
        if usable < count:
            forest.ended.update(ids[usable:])
            self._stats.ended += count - usable
            if not usable:
                return
            ids, tokens = ids[:usable], tokens[: usable * event.block_size * 4]
        if above is None or parent is None:
            run = self._root(event, salt)
        elif above.block_size == event.block_size and above.ends_with(parent):
            run = above
        else:
            run = above.branch(above.position(parent), event.block_size)
        position = len(run)
        forest.extend(run, ids, tokens, media)
        if self.witness is not None and not run.media:
            self.witness.see(run, position)
        self._reach.add(forest, run, position, ids, parent)

    def _root(self, event: BlockStored, salt: str | None) -> Run:
        return Run(
            self._blocks,
            model=event.lora_name or self._model,
            block_size=event.block_size,
            seed=None if salt is None else salt_parent(salt),
        )

    def _remove_inner(self, forest: Forest, block: int) -> None:
        """Remove a block that others follow, or that is cut off: what follows it cannot be reached."""
        run = forest.run_of(block)
        if run is None:
            self._stats.unknown_removed += 1
            return
        self._stats.removed += 1
        if not run.ends_with(block):
            forest.split(run, run.position(block))
        self._reach.drop(forest, run, block)


def _check_parent(forest: Forest, parent: int | None, block: int) -> None:
    """A block that is stored again must follow the same block as before. Raises `UntrustedEvents`."""
    run = forest.run_of(block)
    if run is None:
        return
    position = run.position(block)
    if parent != (run[position - 1] if position else run.parent):
        raise UntrustedEvents("one hash names blocks that follow different prefixes")
