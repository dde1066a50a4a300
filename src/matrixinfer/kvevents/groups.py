"""Attention groups besides the first: what they hold, and which prefixes that lets the engine reuse.

An engine with several kinds of attention keeps the blocks of each kind in a group of its own, and reuses a prefix only
where *every* group holds it. What that takes depends on the kind (vLLM 0.32 and 0.33; `needed` says it in blocks)::

    full, MLA, sink      every block from the start to the prefix's end
    sliding window w     the last ceil((w - 1) / block) blocks before the end
    chunked              every block from the start of the chunk that the end lies in
    mamba                the one checkpoint at the end

A block's hash names the whole prefix up to its end, and is the same in every group and at every block size. So a group
is a set of hashes; what links them is only which hash comes one block earlier. Groups that publish sparsely leave that
out, and then it is known from the group whose tokens are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum

from matrixinfer.kvevents.wire import BlockStored

_MAX_RETIRED = 65_536
"""Links of hashes that are not held are kept for their return, up to this many per group."""
_MAX_RATIO = 16
"""The largest ratio between two groups' block sizes at which their blocks are still related."""


START = -1
"""What comes before the first block of a prefix."""
_UNKNOWN = -2
_WHOLE = 1 << 62
"""In place of a number of blocks: all from the start."""


class Kind(Enum):
    """How a group's attention looks back."""

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    MAMBA = "mamba"


_KINDS = {
    None: Kind.FULL,
    "full_attention": Kind.FULL,
    "mla_attention": Kind.FULL,
    "sink_full_attention": Kind.FULL,
    "sliding_window": Kind.SLIDING,
    "sliding_window_mla": Kind.SLIDING,
    "chunked_local_attention": Kind.CHUNKED,
    "mamba": Kind.MAMBA,
}
"""The kinds that engines name in `kv_cache_spec_kind`. No name: engines with one group, and older ones."""


class Group:
    """One group's hashes, each with the number of consecutive blocks that end with it and are held.

    `span` is the window or the chunk, in tokens; None for the other kinds, and where the engine does not publish it: then
    it matters only whether those blocks begin at the start, and they are not counted, as a block that joins or leaves
    would change all that follow. `before` finds the hash that comes a number of tokens earlier on the same prefix, or
    `START`; None where that is not known.
    """

    __slots__ = ("_after", "_before", "_copies", "_find", "_links", "_streaks", "block_size", "kind", "span")

    def __init__(self, kind: Kind, block_size: int, span: int | None, before: Callable[[int, int], int | None]) -> None:
        self.kind = kind
        self.block_size = block_size
        self.span = span
        self._find = before
        self._copies: dict[int, int] = {}
        self._streaks: dict[int, int] = {}
        self._links: dict[int, int] = {}  # hash -> the one a block earlier, as events named it
        self._before: dict[int, int] = {}  # the same for those that are held, and counted on
        self._after: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, block: int) -> bool:
        return block in self._copies

    def needed(self, end: int) -> int:
        """How many blocks must be held for a prefix of `end` tokens, the last of which ends there."""
        blocks = end // self.block_size
        if self.kind is Kind.MAMBA:
            return 1
        if self.kind is Kind.SLIDING and self.span is not None:
            return min(blocks, -(-(self.span - 1) // self.block_size))
        if self.kind is Kind.CHUNKED and self.span is not None:
            return end % self.span // self.block_size
        return blocks

    def holds(self, block: int, end: int, *, more: int = 0) -> bool:
        """Whether the group holds the prefix of `end` tokens that `block` names, and `more` blocks before what it needs."""
        if self._is_unbounded:
            return self._streaks.get(block) == _WHOLE
        needed = min(self.needed(end) + more, end // self.block_size)
        return needed <= 0 or self._streaks.get(block, 0) >= needed

    def add(self, blocks: Iterable[int], parent: int | None, *, linked: bool = True) -> Iterator[int]:
        """One more copy of each of `blocks`. Yields the hashes whose prefixes may have become reusable.

        If they are `linked`, they follow each other and `parent`; without one they begin at the start.
        """
        for block in blocks:
            if linked:
                self.link(block, START if parent is None else parent)
            copies = self._copies.get(block, 0)
            self._copies[block] = copies + 1
            if not copies or (parent is not None and block not in self._before):
                yield from self._connect(block)
            parent = block

    def remove(self, blocks: Iterable[int]) -> Iterator[int]:
        """One copy less of each of `blocks`. Yields the hashes whose prefixes may not be reusable any more."""
        for block in blocks:
            copies = self._copies.get(block, 0)
            if copies > 1:
                self._copies[block] = copies - 1
            elif copies:
                del self._copies[block]
                del self._streaks[block]
                before = self._before.pop(block, None)
                if before is not None:
                    self._leave(before, block)
                yield block
                yield from self._recount(self._after.get(block, ()))

    def link(self, block: int, parent: int) -> None:
        """`block` follows `parent` directly. `known` counts with it."""
        if block not in self._links and len(self._links) >= _MAX_RETIRED + len(self._copies):
            del self._links[next(iter(self._links))]
        self._links[block] = parent

    def known(self, block: int) -> Iterator[int]:
        """What comes before `block`, or before one of those before it, may be known now. Yields as `add` does."""
        if block not in self._copies or self.kind is Kind.MAMBA:
            return
        yield from self._connect(block)
        at: int | None = block
        for _ in range(_MAX_RATIO):
            at = None if at is None else self._before.get(at)
            if at is None or at not in self._copies:
                return
            if at not in self._before:
                yield from self._connect(at)

    def resize(self, block_size: int) -> Iterator[int]:
        """The group's blocks are larger than they seemed. Yields as `add` does."""
        self.block_size = block_size
        self._before.clear()
        self._after.clear()
        for block in self._copies:
            yield from self._connect(block)

    def clear(self) -> None:
        """Nothing is held any more. What follows what stays true."""
        for part in (self._copies, self._streaks, self._before, self._after):
            part.clear()
        for block in list(self._links)[: max(0, len(self._links) - _MAX_RETIRED)]:
            del self._links[block]

    @property
    def memory_bytes(self) -> int:
        """Memory, estimated."""
        return 400 * len(self._copies) + 100 * len(self._links)

    def _connect(self, block: int) -> Iterator[int]:
        """Link a held block with the one before it, if that is known, and so on backwards; then recount their streaks."""
        changed = [block]
        at: int | None = block if self.kind is not Kind.MAMBA else None
        while at is not None:
            before = self._find(at, self.block_size)
            if before is None:
                before = self._before_by_followers(at)
            if before is None:
                before = self._links.get(at)
            now = self._before.get(at)
            if before is None or before == now:
                break  # what is known of a prefix stays true, also when it cannot be looked up right now
            if now is not None:
                del self._before[at]
                self._leave(now, at)
            self._before[at] = before
            self._after.setdefault(before, set()).add(at)
            at = before if before in self._copies else None
            changed += [] if at is None else [at]
        yield from self._recount(changed)

    def _before_by_followers(self, block: int) -> int | None:
        """What comes before `block`, found from a block that follows it: where that one begins a larger block elsewhere."""
        followers = self._after.get(block, set())
        for distance in range(2, _MAX_RATIO + 1):
            for follower in followers:
                before = self._find(follower, distance * self.block_size)
                if before is not None:
                    return before
            followers = set().union(*(self._after.get(follower, ()) for follower in followers))
            if not followers:
                break
        return None

    def _leave(self, before: int, block: int) -> None:
        after = self._after[before]
        after.discard(block)
        if not after:
            del self._after[before]

    def _recount(self, blocks: Iterable[int]) -> Iterator[int]:
        """Count the blocks that are held before each of `blocks`, and on to those that follow while counts change.

        Raises `ValueError` for blocks that follow themselves, which only events that contradict each other make.
        """
        most = self._most()
        pending = list(blocks)
        while pending:
            block = pending.pop()
            if block not in self._copies:
                continue
            streak = self._streak(block, most)
            if self._streaks.get(block) != streak:
                self._streaks[block] = streak
                yield block
                pending += self._after.get(block, ())

    def _streak(self, block: int, most: int) -> int:
        """How many consecutive blocks are held that end with `block`, up to `most`."""
        before = self._before.get(block, _UNKNOWN)
        if most == _WHOLE:
            return _WHOLE if before == START or self._streaks.get(before) == _WHOLE else 1
        streak = min(most, 1 + self._streaks.get(before, 0))
        if streak > len(self._copies):
            raise ValueError("a block follows itself")
        return streak

    @property
    def _is_unbounded(self) -> bool:
        return self.kind is Kind.FULL or (self.kind is not Kind.MAMBA and self.span is None)

    def _most(self) -> int:
        """The longest streak that anybody asks for."""
        if self._is_unbounded:
            return _WHOLE
        if self.kind is Kind.SLIDING and self.span is not None:
            return 1 + -(-(self.span - 1) // self.block_size)
        return max(1, self.span // self.block_size) if self.kind is Kind.CHUNKED and self.span is not None else 1


def kind_of(event: BlockStored) -> Kind | None:
    """The kind of attention that an event's group has; None for kinds that nobody knows here."""
    return _KINDS.get(event.kv_cache_spec_kind)
