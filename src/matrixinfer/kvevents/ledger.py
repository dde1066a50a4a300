"""Engine blocks to token blocks: what one engine holds, told from its events, kept as index operations.

An engine names its blocks by opaque hashes and sizes them as it likes; the index names token blocks by their content.
The ledger is the only owner of engine hashes. It follows each chain of engine blocks, cuts its tokens anew into token
blocks by position, and keeps in the index exactly the token blocks that a prompt can reach: those covered by an
unbroken path of present engine blocks from the root.

Consecutive engine blocks live in a `_Run`, which grows at its end as chains do and shrinks there as engines evict. Two
things are counted: engine copies per hash (a removed copy is not a removed block), and supports per token block (the
engine blocks `[a b]` and `[a c]` both support the token block `a`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matrixinfer.blocks import TokenBlockProcessor, salt_parent
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.wire import AllBlocksCleared, BlockRemoved, BlockStored, Event, block_id, tokens_of

_MAX_TREES = 16  # cache media and attention groups of one engine


@dataclass(slots=True, kw_only=True)
class LedgerStats:
    """What the events said and what became of it, in engine blocks unless named otherwise."""

    stored: int = 0
    removed: int = 0
    clears: int = 0
    """AllBlocksCleared events."""
    copies: int = 0
    """Stored again while present."""
    orphans: int = 0
    """Dropped because their parent was never seen."""
    unknown_removed: int = 0
    """Removed without having been seen."""
    ended: int = 0
    """Present but not indexed: their content depends on more than tokens, adapter and salt."""
    other_attention: int = 0
    """Events of groups that do not describe whole prefixes."""
    misfits: int = 0
    """Events whose tokens do not fit their blocks."""


class _Run:
    """Consecutive engine blocks of one chain; a mutable record that only the ledger touches.

    Offsets count tokens from the chain's root. `tokens` (four bytes each) and `names` (token blocks completed) begin
    at `base`, the last token-block boundary at or before `start`.
    """

    __slots__ = ("base", "block_size", "ids", "model", "names", "parent", "seed", "start", "tokens")

    def __init__(self, *, model: str, block_size: int, parent: int | None, start: int, base: int) -> None:
        self.model = model
        self.block_size = block_size
        self.parent = parent
        self.start = start
        self.base = base
        self.seed: int | None = None  # hash that the block at `base` chains to: token block, salt or nothing
        self.ids: list[int] = []
        self.tokens = bytearray()
        self.names: list[int] = []

    def end_of(self, position: int) -> int:
        """The offset behind the engine block at `position`."""
        return self.start + (position + 1) * self.block_size


class _Tree:
    """The engine blocks of one medium and attention group."""

    __slots__ = ("branches", "copies", "cut", "ended", "runs")

    def __init__(self) -> None:
        self.runs: dict[int, _Run] = {}
        self.copies: dict[int, int] = {}  # copies beyond the first
        self.branches: dict[int, list[int]] = {}  # block -> first blocks of the runs that follow it
        self.cut: set[int] = set()  # present, but an ancestor is gone
        self.ended: set[int] = set()  # present, but not indexed

    def below(self, block: int) -> Iterator[tuple[_Run, int]]:
        """Every present block in the runs that branch off `block`, parents first, as (run, position)."""
        pending = list(self.branches.get(block, ()))
        while pending:
            run = self.runs[pending.pop()]
            for position, child in enumerate(run.ids):
                yield run, position
                pending += self.branches.get(child, ())


class Ledger:
    """Applies one engine's events to the index under `pod`.

    `model` is the index's name for the engine's base model; blocks of an adapter go under the adapter's name.
    """

    def __init__(self, *, pod: str, model: str, blocks: TokenBlockProcessor, index: BlockIndex) -> None:
        self.pod = pod
        self.model = model
        self.stats = LedgerStats()
        self.block_size: int | None = None
        """Tokens per engine block, as the last event said."""
        self._blocks = blocks
        self._index = index
        self._trees: dict[tuple[str, int], _Tree] = {}
        self._supports: dict[str, dict[int, int]] = {}

    def __len__(self) -> int:
        """Distinct engine blocks present."""
        return sum(len(tree.runs) + len(tree.ended) for tree in self._trees.values())

    def apply(self, event: Event) -> None:
        """Apply one event."""
        if isinstance(event, BlockStored):
            self._store(event)
        elif isinstance(event, BlockRemoved):
            self._remove(event)
        elif isinstance(event, AllBlocksCleared):
            self.stats.clears += 1
            self.clear()

    def clear(self) -> None:
        """The engine holds nothing, or nothing is known of it any more."""
        self._trees.clear()
        self._supports.clear()
        self._index.clear(self.pod)

    # Stored

    def _store(self, event: BlockStored) -> None:
        if event.kv_cache_spec_kind not in (None, "full_attention"):
            self.stats.other_attention += 1
            return
        tokens = tokens_of(event) if event.block_size > 0 and event.block_hashes else None
        key = (event.medium or "GPU", event.group_idx or 0)
        tree = self._trees.get(key)
        if tokens is None or (tree is None and len(self._trees) >= _MAX_TREES):
            self.stats.misfits += 1
            return
        if tree is None:
            tree = self._trees[key] = _Tree()
        self.block_size = event.block_size
        ids = [block_id(h) for h in event.block_hashes]
        self.stats.stored += len(ids)
        parent = None if event.parent_block_hash is None else block_id(event.parent_block_hash)
        for first, last in self._new_stretches(tree, ids):
            stretch = memoryview(tokens)[first * event.block_size * 4 : last * event.block_size * 4]
            before = ids[first - 1] if first else parent
            self._append(tree, event, first, ids[first:last], stretch, before)

    def _new_stretches(self, tree: _Tree, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Stretches [first, last) of blocks that are not present yet; copies of present ones are counted."""
        distinct = set(ids)
        if len(distinct) == len(ids) and tree.runs.keys().isdisjoint(distinct) and tree.ended.isdisjoint(distinct):
            yield 0, len(ids)
            return
        first = 0
        stretch: set[int] = set()
        for position, block in enumerate(ids):
            if block not in tree.runs and block not in tree.ended and block not in stretch:
                stretch.add(block)
                continue
            if first < position:
                yield first, position  # from here on its blocks are present
            first = position + 1
            stretch.clear()
            if block in tree.runs or block in tree.ended:
                tree.copies[block] = tree.copies.get(block, 0) + 1
                self.stats.copies += 1
        if first < len(ids):
            yield first, len(ids)

    def _append(
        self, tree: _Tree, event: BlockStored, first: int, ids: list[int], tokens: memoryview, parent: int | None
    ) -> None:
        """Take new blocks that follow `parent` (None: the root)."""
        if parent is not None and parent not in tree.runs and parent not in tree.ended:
            self.stats.orphans += len(ids)
            return
        usable, salt = _usable(event, first, len(ids), at_root=parent is None)
        if parent in tree.ended:
            usable = 0
        if salt is not None and self._blocks.scheme == "block":
            usable = 0
        if usable < len(ids):
            tree.ended.update(ids[usable:])
            self.stats.ended += len(ids) - usable
        if not usable:
            return
        run = self._run_after(tree, parent, event, salt)
        position = len(run.ids)
        if not run.ids and parent is not None:
            tree.branches.setdefault(parent, []).append(ids[0])
        del ids[usable:]
        run.ids += ids
        tree.runs.update(dict.fromkeys(ids, run))
        self._extend(run, tokens[: usable * event.block_size * 4])
        if parent in tree.cut:
            tree.cut.update(ids)
            return
        self._support(run, position, len(run.ids))
        if tree.cut:
            self._rejoin(tree, ids)

    def _run_after(self, tree: _Tree, parent: int | None, event: BlockStored, salt: str | None) -> _Run:
        """The run that blocks after `parent` belong to: the parent's own where it ends there, or a new one."""
        if parent is None:
            model = event.lora_name or self.model
            run = _Run(model=model, block_size=event.block_size, parent=None, start=0, base=0)
            run.seed = None if salt is None else salt_parent(salt)
            return run
        above = tree.runs[parent]
        if above.ids[-1] == parent and above.block_size == event.block_size:
            return above
        return self._branch(above, above.ids.index(parent), event.block_size)

    def _branch(self, above: _Run, position: int, block_size: int) -> _Run:
        """An empty run that follows the block at `position` of `above`."""
        size = self._blocks.block_size
        start = above.end_of(position)
        base = start // size * size
        run = _Run(model=above.model, block_size=block_size, parent=above.ids[position], start=start, base=base)
        completed = (base - above.base) // size
        run.seed = above.names[completed - 1] if completed else above.seed
        run.tokens += above.tokens[(base - above.base) * 4 : (start - above.base) * 4]
        return run

    def _extend(self, run: _Run, tokens: memoryview | bytearray) -> None:
        """Add tokens to a run and name the token blocks that they complete."""
        run.tokens += tokens
        done = len(run.names)
        with memoryview(run.tokens) as view:
            run.names += self._blocks.hashes(
                view[done * self._blocks.block_size * 4 :], run.names[-1] if done else run.seed
            )

    def _rejoin(self, tree: _Tree, ids: Sequence[int]) -> None:
        """Blocks that were cut off by the absence of one of `ids` can be reached again."""
        for block in ids:
            for run, position in tree.below(block):
                tree.cut.discard(run.ids[position])
                self._support(run, position, position + 1)

    # Removed

    def _remove(self, event: BlockRemoved) -> None:
        tree = self._trees.get((event.medium or "GPU", event.group_idx or 0))
        gone: dict[str, list[int]] = {}
        for engine_hash in event.block_hashes:
            block = block_id(engine_hash)
            if tree is None or (block not in tree.runs and block not in tree.ended):
                self.stats.unknown_removed += 1
            elif tree.copies.get(block):
                self.stats.removed += 1
                self._drop_copy(tree, block)
            else:
                self.stats.removed += 1
                tree.ended.discard(block)
                if block in tree.runs:
                    self._drop(tree, block, gone)
        for model, names in gone.items():
            self._index.remove(model, self.pod, names)

    def _drop_copy(self, tree: _Tree, block: int) -> None:
        tree.copies[block] -= 1
        if not tree.copies[block]:
            del tree.copies[block]

    def _drop(self, tree: _Tree, block: int, gone: dict[str, list[int]]) -> None:
        run = tree.runs.pop(block)
        if run.ids[-1] != block:
            self._split(tree, run, run.ids.index(block))
        if block in tree.cut:
            tree.cut.discard(block)
        else:
            for below, position in tree.below(block):
                tree.cut.add(below.ids[position])
                self._unsupport(below, position, gone)
            self._unsupport(run, len(run.ids) - 1, gone)
        run.ids.pop()
        self._truncate(run)
        if not run.ids and run.parent is not None:
            siblings = tree.branches[run.parent]
            siblings.remove(block)
            if not siblings:
                del tree.branches[run.parent]

    def _split(self, tree: _Tree, run: _Run, position: int) -> None:
        """Make the block at `position` the last of its run; what followed becomes a run that branches off it."""
        rest = self._branch(run, position, run.block_size)
        rest.ids = run.ids[position + 1 :]
        self._extend(rest, run.tokens[(rest.start - run.base) * 4 :])
        tree.runs.update(dict.fromkeys(rest.ids, rest))
        tree.branches.setdefault(run.ids[position], []).append(rest.ids[0])
        del run.ids[position + 1 :]
        self._truncate(run)

    def _truncate(self, run: _Run) -> None:
        """Drop the tokens and names behind a run's last block."""
        length = run.end_of(len(run.ids) - 1) - run.base
        del run.tokens[length * 4 :]
        del run.names[length // self._blocks.block_size :]

    # Supports

    def _completed(self, run: _Run, first: int, last: int) -> tuple[int, int]:
        """Range in `run.names` of the token blocks that end in the engine blocks [first, last)."""
        size = self._blocks.block_size
        return (run.end_of(first - 1) - run.base) // size, (run.end_of(last - 1) - run.base) // size

    def _support(self, run: _Run, first: int, last: int) -> None:
        low, high = self._completed(run, first, last)
        if low == high:
            return
        names = run.names[low:high]
        supports = self._supports.setdefault(run.model, {})
        if self._blocks.scheme == "prefix" and supports.keys().isdisjoint(names):
            supports.update(dict.fromkeys(names, 1))
        else:
            for name in names:
                supports[name] = supports.get(name, 0) + 1
        parent = run.names[low - 1] if low else run.seed if run.base else None
        self._index.add(run.model, self.pod, names, parent)

    def _unsupport(self, run: _Run, position: int, gone: dict[str, list[int]]) -> None:
        low, high = self._completed(run, position, position + 1)
        supports = self._supports.get(run.model, {})
        for name in reversed(run.names[low:high]):
            left = supports[name] - 1
            if left:
                supports[name] = left
            else:
                del supports[name]
                gone.setdefault(run.model, []).append(name)


def _usable(event: BlockStored, first: int, count: int, *, at_root: bool) -> tuple[int, str | None]:
    """How many of `count` blocks from position `first` depend on nothing but tokens, adapter and salt; and the salt.

    Extra keys are untagged: `[adapter name, (item, offset) …, salt, digests …]`, each only where present. A salt is
    the one string left on a root block; anything else ends what can be indexed.
    """
    if event.lora_id is not None and event.lora_name is None:
        return 0, None
    if event.extra_keys is None:
        return count, None
    salt: str | None = None
    for offset, keys in enumerate(event.extra_keys[first : first + count]):
        if not keys:
            continue
        rest = list(keys) if isinstance(keys, (list, tuple)) else [None]
        if event.lora_name is not None and rest[0] == event.lora_name:
            del rest[0]
        if at_root and offset == 0 and len(rest) == 1 and isinstance(rest[0], str):
            salt = rest[0]
        elif rest:
            return offset, salt
    return count, salt
