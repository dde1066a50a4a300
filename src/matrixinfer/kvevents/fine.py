"""Blocks that are smaller than those of their group: pieces of a block that is not full yet.

An engine whose groups have blocks of different sizes hashes at the finest of them, and may publish a group's last tokens
in such pieces. Only whole blocks are reused. A piece that ends where a whole block ends is that block: its hash names the
same prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Whole(NamedTuple):
    """A whole block that pieces make."""

    block: int
    parent: int | None
    """The whole block before it; None at the root."""
    tokens: bytes
    keys: list[object]
    """What the events say of each of its pieces beside tokens."""
    last: int
    """The position in the event of its last piece."""


class Pieces:
    """The pieces that one group holds, by hash, with the tokens since the last whole block."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[int | None, bytes, list[object]]] = {}
        self._copies: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def add(
        self,
        blocks: Sequence[int],
        parent: int | None,
        tokens: bytes,
        size: int,
        whole: int,
        keys: Sequence[object] | None = None,
    ) -> Iterator[Whole]:
        """Take blocks of `size` tokens, four bytes each, that follow `parent`. Yields the whole ones, of `whole` tokens.

        `keys` are what the event says of each of them beside tokens.
        """
        nothing: tuple[int | None, bytes, list[object]] = parent, b"", []
        before, pending, known = nothing if parent is None else self._pieces.get(parent, nothing)
        for position, block in enumerate(blocks):
            known = [*known, keys[position] if keys is not None and position < len(keys) else None]
            pending += tokens[position * size * 4 : (position + 1) * size * 4]
            if len(pending) < whole * 4:
                self._pieces[block] = before, pending, known
                self._copies[block] = self._copies.get(block, 0) + 1
                continue
            yield Whole(block, before, pending, known, position)
            before, pending, known = block, b"", []

    def remove(self, blocks: Sequence[int]) -> list[int]:
        """Drop one copy of each of `blocks` that is a piece. Returns the others."""
        left = []
        for block in blocks:
            copies = self._copies.get(block)
            if copies is None:
                left.append(block)
            elif copies > 1:
                self._copies[block] = copies - 1
            else:
                del self._copies[block], self._pieces[block]
        return left

    def clear(self) -> None:
        """Nothing is held any more."""
        self._pieces.clear()
        self._copies.clear()
