"""Which hash names the prefix that is some tokens shorter than another one's.

Groups of attention need it to count blocks backwards. The forest of the primary group knows for the ends of its own
blocks. Groups with smaller blocks have further hashes between them. Events that come with all their tokens show these,
and what a hash depends on: the hash before it, its block's tokens, and those after it with speculative decoding. So
a hash that one prompt's event has shown is found on every other prompt with the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias, TypeVar

from matrixinfer.blocks import Medium, media_in, salt_parent, token_bytes
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.groups import START
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.stored import indexable, media_ahead
from matrixinfer.kvevents.wire import BlockStored

_MOST = 65_536
"""Hashes remembered between those of the primary group, newest last."""
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_Start: TypeAlias = int | tuple[str, int | None]
"""The hash before, or model and salt at the root."""
_Content: TypeAlias = tuple[_Start, bytes, tuple[Medium, ...]]
"""What a hash depends on."""


class Predecessors:
    """Knows the hashes of one engine. `model` is the index's name of its base model."""

    def __init__(self, model: str) -> None:
        self.forest: Forest | None = None
        """The primary group's blocks."""
        self.lookahead = 0
        """Tokens after a block on which its hash depends as well."""
        self._model = model
        self._before: dict[int, tuple[int, int]] = {}  # hash -> the one before it, and how many tokens
        self._by_content: dict[_Content, int] = {}
        self._waiting: dict[_Content, set[int]] = {}  # blocks of the primary group that contain an unknown hash
        self._sizes: dict[int, None] = {}  # tokens per smaller block

    def learn(self, event: BlockStored, blocks: Sequence[int], parent: int | None, tokens: bytes) -> Iterator[int]:
        """An event names blocks with all their tokens, smaller ones than the primary group has.

        Yields blocks of the primary group for which `before` may give an answer now.
        """
        size = event.block_size
        usable, salt, media = indexable(event, 0, len(blocks), at_root=parent is None)
        ahead = [token_bytes(after) for after in event.lookahead or ()]
        self._sizes[size] = None
        start: _Start | None = parent
        if start is None:
            start = event.lora_name or self._model, None if salt is None else salt_parent(salt)
        after = dict(media_ahead(event))
        for position, block in enumerate(blocks):
            _keep(self._before, block, (start if isinstance(start, int) else START, size))
            if position < usable:
                own = tokens[position * size * 4 : (position + 1) * size * 4]
                inside = media_in(media, position * size, (position + 1) * size) if media else []
                inside += [(size + at, name) for at, name in after.get(position, ())]
                content = start, own + (ahead[position] if ahead else b""), tuple(inside)
                _keep(self._by_content, content, block)
                yield from self._waiting.pop(content, ())
            start = block

    def before(self, block: int, tokens: int) -> int | None:
        """The block that ends that many tokens before the end of `block`, on the same prefix.

        `START` if it begins there; None if that is not known.
        """
        known = self._before.get(block)
        if known is not None and known[1] == tokens:
            return known[0]
        run = None if self.forest is None else self.forest.run_of(block)
        if run is None or self.forest is None:
            return None
        position = run.position(block)
        if tokens < run.block_size:
            return self._within(run, position, tokens)
        end = run.end(position) - tokens
        return START if end == 0 else ending_at(self.forest, run, end)

    def consecutive(self, blocks: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
        """Pairs of `blocks`, in ascending order but perhaps with others between them, that follow each other directly.

        Sparse events name windows that end where the primary group's blocks do. So what is left out between two blocks
        whose ends are known lies directly after the first.
        """
        ends = [self._end(block) for block in blocks]
        for first, last in pairwise(range(len(blocks))):
            after = _deduced(ends, last, size)
            if after is None or ends[first] in (None, after - size):
                yield blocks[first], blocks[last]

    def deduce(self, blocks: Sequence[int], size: int) -> Iterator[int]:
        """Learn what the hashes among `blocks` depend on that end within blocks of the primary group.

        Yields as `learn` does.
        """
        ends = [self._end(block) for block in blocks]
        for position, block in enumerate(blocks):
            end = _deduced(ends, position, size) if ends[position] is None else None
            anchor = next(
                (other for other, known in zip(blocks[position:], ends[position:], strict=True) if known), None
            )
            run = None if self.forest is None or anchor is None else self.forest.run_of(anchor)
            if end is not None and run is not None and self.forest is not None:
                whole = ending_at(self.forest, run, -(-end // run.block_size) * run.block_size)
                within = None if whole is None else self.forest.run_of(whole)
                if whole is not None and within is not None and end % within.block_size:
                    yield from self._deduce(block, within, within.position(whole), end, size)

    def clear(self) -> None:
        """Nothing is held any more. What is known of hashes stays true."""
        self._waiting.clear()

    def reset(self) -> None:
        """Expect another engine."""
        for part in (self._before, self._by_content, self._waiting, self._sizes):
            part.clear()

    def _end(self, block: int) -> int | None:
        run = None if self.forest is None else self.forest.run_of(block)
        return None if run is None else run.end(run.position(block))

    def _within(self, run: Run, position: int, tokens: int) -> int | None:
        """The hash that ends that many tokens before the end of the block at `position`, in that block."""
        for size in self._sizes:
            if tokens % size == 0 and run.block_size % size == 0:
                found = self._follow(run, position, size, (run.block_size - tokens) // size)
                return found if isinstance(found, int) else None
        return None

    def _deduce(self, block: int, run: Run, position: int, end: int, size: int) -> Iterator[int]:
        """`block` ends at the token `end`, within the block at `position` of a run."""
        number = (end - (run.end(position) - run.block_size)) // size - 1
        before = self._follow(run, position, size, number)
        content = None if before is None else self._content(run, position, before, number, size)
        if before is not None and content is not None:
            self._sizes[size] = None
            _keep(self._before, block, (before if isinstance(before, int) else START, size))
            _keep(self._by_content, content, block)
            yield from self._waiting.pop(content, ())

    def _follow(self, run: Run, position: int, size: int, count: int) -> _Start | None:
        """The hash of the first `count` smaller blocks in the block at `position`."""
        at: _Start | None = run[position - 1] if position else run.parent
        if at is None:
            at = run.model, run.seed
        for number in range(count):
            content = self._content(run, position, at, number, size)
            if content is None:
                return None
            found = self._by_content.get(content)
            if found is None:
                if content in self._waiting or len(self._waiting) < _MOST:
                    self._waiting.setdefault(content, set()).add(run[position])
                return None
            at = found
        return at

    def _content(self, run: Run, position: int, before: _Start, number: int, size: int) -> _Content | None:
        """What the smaller block with that number in the block at `position` depends on, if that block has it all."""
        first, last = number * size, (number + 1) * size + self.lookahead
        if last > run.block_size:
            return None
        begin = run.end(position) - run.block_size
        media = media_in(run.media, begin + first, begin + last) if run.media else ()
        start = begin - run.base
        return before, run.tokens.part(start + first, start + last), tuple(media)


def ending_at(forest: Forest, run: Run, end: int) -> int | None:
    """The block of a run, or of those that it branches off, that ends at a token."""
    visits = 0
    at: Run | None = run
    while at is not None and end > 0 and visits < 1_000:
        if end > at.start:
            over = (end - at.start) % at.block_size
            return None if over else at[(end - at.start) // at.block_size - 1]
        if at.parent is None:
            return None
        if end == at.start:
            return at.parent
        at, visits = forest.run_of(at.parent), visits + 1
    return None


def _keep(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    if len(known) >= _MOST and key not in known:
        del known[next(iter(known))]
    known[key] = value


def _deduced(ends: Sequence[int | None], position: int, size: int) -> int | None:
    """The end of the block at `position`, counted back from the first known one; None without any."""
    for steps, end in enumerate(ends[position:]):
        if end is not None:
            return end - steps * size if end > steps * size else None
    return None
