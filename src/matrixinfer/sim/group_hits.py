"""The longest prefix that every attention group can reuse, found as vLLM finds it.

Each kind of attention takes a largest length and answers with the longest prefix up to it that its blocks allow. The
kinds take turns until all agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from matrixinfer.sim.attention import CHUNKED, MAMBA, Group, Layout
from matrixinfer.sim.block_pool import NO_BLOCK

Blocks: TypeAlias = list[int]
"""For each block of a prefix its id, or `NO_BLOCK` where none is needed."""

_Row: TypeAlias = list[list[int] | None]
"""For each block those of all groups that are alike, or None where none is needed."""

Find: TypeAlias = Callable[[list[int], int], list[int] | None]
"""Gets groups and the end of a block. Returns the blocks that are cached there, or None where one is missing."""


class GroupHit(NamedTuple):
    """What can be reused of a prompt."""

    tokens: int
    blocks: list[Blocks]
    """Of each group."""
    longest: int
    """The longest prefix that some kind of attention could reuse alone."""


class _Kind(NamedTuple):
    """Groups that are alike are looked up together."""

    group: Group
    numbers: list[int]
    drops: bool


class Finder:
    """Looks up prefixes in the groups of a layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        kinds: dict[Group, list[int]] = {}
        for number, group in enumerate(layout.groups):
            kinds.setdefault(group, []).append(number)
        dropping = set(layout.dropping)
        # Full attention comes first: it limits the others most cheaply.
        self._kinds = sorted(
            (_Kind(group, numbers, not dropping.isdisjoint(numbers)) for group, numbers in kinds.items()),
            key=lambda kind: not kind.group.is_full,
        )

    def longest(self, tokens: int, hashed: int, find: Find) -> GroupHit:
        """The longest prefix of a prompt of `tokens` tokens, `hashed` of which are in blocks with a hash."""
        blocks: list[Blocks] = [[] for _ in self._layout.groups]
        lengths: dict[int, int] = {}
        length, longest, dropped = min(tokens - 1, hashed), 0, set[int]()
        several = len(self._layout.groups) > 1
        while True:
            now = length
            for place, kind in enumerate(self._kinds):
                if kind.group.is_full and place in lengths:
                    now = min(now, lengths[place])
                    continue
                drops = kind.drops and place not in dropped
                peeks = drops and several and kind.group.kind != MAMBA
                most = min(now + kind.group.block_size, hashed) if peeks else now
                found = self._search(kind, most, find, drops=drops)
                after = len(found[0]) * kind.group.block_size
                if drops:
                    dropped.add(place)
                elif after < now:
                    dropped.clear()
                now = lengths[place] = after
                longest = max(longest, now)
                for number, row in zip(kind.numbers, found, strict=True):
                    blocks[number] = row
            if now >= length:
                break
            length = now
            if not several or (len(self._kinds) == 2 and self._kinds[0].group.is_full):
                break
        for group, row in zip(self._layout.groups, blocks, strict=True):
            if group.is_full:
                del row[length // group.block_size :]
        return GroupHit(length, blocks, longest)

    def _search(self, kind: _Kind, most: int, find: Find, *, drops: bool) -> list[Blocks]:
        group, unit = kind.group, self._layout.unit
        size = group.block_size

        def cached(block: int) -> list[int] | None:
            return find(kind.numbers, (block + 1) * size)

        def is_end(blocks: int) -> bool:
            return not blocks * size % unit

        if group.is_full:
            row = _from_start(0, most // size, cached)
            if drops and row:
                row.pop()
        elif group.kind == CHUNKED:
            first = most // (group.span or most) * (group.span or most) // size if most else 0
            row = _from_start(first, most // size, cached)
        elif group.kind == MAMBA:
            row = _state(most // size, cached, is_end)
        else:
            row = _window(most // size, group.blocks_for_hit + drops, cached, is_end, dropped=int(drops))
            if drops and row:
                row.pop()
        while not is_end(len(row)):
            row.pop()
        return [[NO_BLOCK if each is None else each[place] for each in row] for place in range(len(kind.numbers))]


def _from_start(first: int, most: int, cached: Callable[[int], list[int] | None]) -> _Row:
    """All blocks from `first` on."""
    row: _Row = [None] * first
    for block in range(first, most):
        found = cached(block)
        if found is None:
            break
        row.append(found)
    return row


def _state(most: int, cached: Callable[[int], list[int] | None], is_end: Callable[[int], bool]) -> _Row:
    """The last block alone."""
    for block in range(most - 1, -1, -1):
        if is_end(block + 1) and (found := cached(block)) is not None:
            return [*[None] * block, found]
    return []


def _window(
    most: int,
    needed: int,
    cached: Callable[[int], list[int] | None],
    is_end: Callable[[int], bool],
    *,
    dropped: int,
) -> _Row:
    """The last `needed` blocks, or all of them where there are fewer. `dropped` of them are given up later."""
    row: _Row = [None] * most
    run = 0
    for block in range(most - 1, -1, -1):
        found = cached(block)
        if found is None:
            run = 0
            continue
        if not run and not is_end(block + 1 - dropped):
            continue
        row[block] = found
        run += 1
        if run >= needed:
            return row[: block + run]
    while not is_end(run):
        run -= 1
    return row[:run]
