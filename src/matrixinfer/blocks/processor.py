"""Cuts token ids into blocks, and hashes them by one of the schemes."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from struct import Struct
from typing import Literal, TypeAlias

from matrixinfer.blocks.chain import BlockChain, SharedHashes
from matrixinfer.blocks.names import TOP_BIT_CLEARED, Medium, TokenIds, media_in, media_parent, salt_parent, token_bytes

Scheme: TypeAlias = Literal["prefix", "block"]

_pack = Struct(">Q").pack
"""The hash of a block as it enters the next one's."""
_first_of = Struct(">Q24x").unpack
"""The first eight bytes of a digest."""


class TokenBlockProcessor:
    """Cuts token ids into full blocks of `block_size` tokens and hashes each block.

    Raises `ValueError` for an invalid block size or scheme.
    """

    __slots__ = ("block_size", "scheme")

    def __init__(self, block_size: int = 128, scheme: Scheme = "prefix") -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if scheme not in ("prefix", "block"):
            raise ValueError(f"scheme must be 'prefix' or 'block', got {scheme!r}")
        self.block_size = block_size
        self.scheme: Scheme = scheme

    def chain(
        self,
        tokens: TokenIds | Sequence[int],
        *,
        salt: str | None = None,
        media: Sequence[Medium] = (),
        max_blocks: int | None = None,
        hashes: SharedHashes | None = None,
    ) -> BlockChain:
        """The prompt's block hashes.

        `max_blocks` bounds the chain. With the scheme `block` a salted prompt has no blocks, because it must not match,
        and one with media none from the first of these on.
        `hashes` are the known hashes of the first blocks; this list is extended by those that are computed.
        """
        blocks = len(tokens) // self.block_size
        if max_blocks is not None:
            blocks = min(blocks, max_blocks)
        if salt is not None and self.scheme == "block":
            blocks = 0
        if media and self.scheme == "block":
            blocks = min(blocks, media[0][0] // self.block_size)
        used = tokens[: (blocks + 1) * self.block_size]
        data, root = token_bytes(used), None if salt is None else salt_parent(salt)
        if hashes is None or media:
            full = memoryview(data)[: blocks * self.block_size * 4]
            return BlockChain(self, data, root, self.hashes(full, root, media), media)
        self._extend(hashes, data, min(blocks, hashes.limit), root)
        chain = BlockChain(self, data, root, hashes if len(hashes) == blocks else hashes[:blocks])
        self._extend(chain, data, blocks, root)
        return chain

    def _extend(self, hashes: list[int], data: bytes, blocks: int, root: int | None) -> None:
        """Hash the blocks from those on that are known, up to `blocks`. The first block follows `root`."""
        known = len(hashes)
        if known < blocks:
            some = memoryview(data)[known * self.block_size * 4 : blocks * self.block_size * 4]
            hashes += self.hashes(some, hashes[-1] if known else root)

    def overhang(self, blocks: int, engine_block: int) -> int | None:
        """Tokens by which an engine block of `engine_block` tokens extends beyond the first `blocks` blocks.

        That is the case if the engine block begins before their end and ends within the next block. Its tail (see
        `tail`) then shows whether an engine holds it. None if the blocks alone show that.
        """
        over = -(blocks * self.block_size) % engine_block
        return over if 0 < over < self.block_size and self.scheme == "prefix" else None

    def tail(self, data: bytes | bytearray | memoryview, parent: int, media: Sequence[Medium] = ()) -> int:
        """The hash of fewer tokens than a block that follow the block `parent`. `data` is in the form of `token_bytes`."""
        state = sha256((media_parent(parent, media) if media else parent).to_bytes(8, "big"))
        state.update(data)
        return int.from_bytes(state.digest()[:8], "big") & TOP_BIT_CLEARED

    def end(
        self,
        key: int,
        tokens: bytes | bytearray | memoryview,
        ahead: bytes | bytearray | memoryview = b"",
        media: Sequence[Medium] = (),
    ) -> int:
        """The hash that marks the end of a reusable prefix (`matrixinfer.kvevents.reusable`).

        `tokens` are the prefix's last ones, at most a block of them, which follow the block `key` (`ROOT` at the start of
        a prompt). `ahead` are those tokens of the prompt after the end that decide as well whether it is reused. `media`
        begin among either.
        """
        state = sha256(b"end%d\0" % (len(ahead) // 4))
        state.update((media_parent(key, media) if media else key).to_bytes(8, "big"))
        state.update(tokens)
        state.update(ahead)
        return int.from_bytes(state.digest()[:8], "big") & TOP_BIT_CLEARED

    def hashes(
        self, data: bytes | bytearray | memoryview, parent: int | None = None, media: Sequence[Medium] = ()
    ) -> list[int]:
        """The hashes of the full blocks in `data` (see `token_bytes`). The first block follows the block `parent`.

        `media` begin there, counted from the beginning of `data`.
        """
        out: list[int] = []
        size = self.block_size * 4
        view = memoryview(data)
        if self.scheme == "block":
            for start in range(0, len(view) - size + 1, size):
                digest = sha256(view[start : start + size]).digest()
                out.append(int.from_bytes(digest[:8], "big") & TOP_BIT_CLEARED)
            return out
        if media:
            for start in range(0, len(view) - size + 1, size):
                inside = media_in(media, start // 4, start // 4 + self.block_size)
                follows = media_parent(parent, inside) if inside else parent
                (parent,) = self.hashes(view[start : start + size], follows)
                out.append(parent)
            return out
        before = b"" if parent is None else _pack(parent)
        for start in range(0, len(view) - size + 1, size):
            # One call of SHA-256 costs less than two, although it takes a copy of the tokens.
            name = _first_of(sha256(before + view[start : start + size]).digest())[0] & TOP_BIT_CLEARED
            out.append(name)
            before = _pack(name)
        return out
