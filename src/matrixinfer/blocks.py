"""Computes block hashes from token ids. The index identifies a prompt's blocks by these hashes.

A prompt is cut into blocks of `block_size` tokens; only full blocks count. There are two schemes:

`prefix` (default): like a KV block, a block's hash depends on everything before it::

    h[i] = u64(SHA-256(h[i-1] as 8 bytes big endian ‖ tokens as u32 big endian)[:8]) with the top bit cleared

Block 0 has no parent bytes. With a cache salt, block 0 has the parent `salt_parent(salt)`. If images, audio or video begin
in a block, its parent is `media_parent` of what it follows and of these.

`block`: each block is hashed separately, like block 0 above. Existing MatrixInfer and kthena writers use this scheme in
Redis. Equal blocks after different prefixes have the same hash, so matches are only hints; salted prompts never match.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = npt.NDArray[np.uint32]
"""Token ids: shape (n,), one unsigned 32-bit id per token."""

Scheme: TypeAlias = Literal["prefix", "block"]

Medium: TypeAlias = tuple[int, str]
"""Where an image, audio or video begins, in tokens, and the engine's name of its content."""

_TOP_BIT_CLEARED = (1 << 63) - 1


ROOT = int.from_bytes(sha256(b"root\0").digest()[:8], "big") & _TOP_BIT_CLEARED
"""Stands for the block before the first one, where a prompt has no salt."""


def salt_parent(salt: str) -> int:
    """The parent hash of block 0 for a cache salt, so that prompts share blocks only with prompts of the same salt."""
    return int.from_bytes(sha256(b"salt\0" + salt.encode()).digest()[:8], "big") & _TOP_BIT_CLEARED


def media_parent(parent: int | None, media: Sequence[Medium]) -> int:
    """What a block follows in which `media` begin. They are counted from the block's first token, in ascending order.

    The blocks behind it follow it, so each depends on all media that begin before its end.
    """
    state = sha256(b"media\0" + (ROOT if parent is None else parent).to_bytes(8, "big"))
    for start, name in media:
        data = name.encode("utf-8", "surrogatepass")
        state.update(start.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data)
    return int.from_bytes(state.digest()[:8], "big") & _TOP_BIT_CLEARED


def media_in(media: Sequence[Medium], first: int, last: int) -> list[Medium]:
    """Those of `media` that begin at the tokens [first, last), counted from `first`."""
    return [(start - first, name) for start, name in media if first <= start < last]


def token_bytes(tokens: TokenIds | Sequence[int]) -> bytes:
    """The bytes that are hashed for token ids: four bytes per id, big-endian.

    Raises `OverflowError` for ids outside the range of an unsigned 32-bit integer, and `TypeError` for other types and
    for arrays that are not uint32 or not of one dimension.
    """
    if not isinstance(tokens, np.ndarray):
        if isinstance(tokens, bytes | bytearray | memoryview):  # `array` would read them as machine integers
            raise TypeError(f"expected a sequence of integers, got {type(tokens).__name__}")
        tokens = np.array(array("I", tokens))  # checks each id, three times as fast as numpy
    elif tokens.dtype != np.uint32:
        raise TypeError(f"expected an array of uint32, got {tokens.dtype}")
    elif tokens.ndim != 1:
        raise TypeError(f"expected an array of shape (n,), got {tokens.shape}")
    return tokens.astype(">u4").tobytes()


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
        """The prompt's block hashes, which are computed as they are read.

        `max_blocks` bounds the chain. With the scheme `block` a salted prompt has no blocks, because it must not match,
        and one with media none from the first of these on.
        `hashes` are the known hashes of the first blocks; the chain extends this list as it computes more.
        """
        blocks = len(tokens) // self.block_size
        if max_blocks is not None:
            blocks = min(blocks, max_blocks)
        if salt is not None and self.scheme == "block":
            blocks = 0
        if media and self.scheme == "block":
            blocks = min(blocks, media[0][0] // self.block_size)
        used = tokens[: (blocks + 1) * self.block_size]
        return BlockChain(
            self,
            token_bytes(used),
            blocks,
            None if salt is None else salt_parent(salt),
            SharedHashes(limit=blocks) if hashes is None or media else hashes,
            media,
        )

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
        return int.from_bytes(state.digest()[:8], "big") & _TOP_BIT_CLEARED

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
        return int.from_bytes(state.digest()[:8], "big") & _TOP_BIT_CLEARED

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
                out.append(int.from_bytes(digest[:8], "big") & _TOP_BIT_CLEARED)
            return out
        if media:
            for start in range(0, len(view) - size + 1, size):
                inside = media_in(media, start // 4, start // 4 + self.block_size)
                follows = media_parent(parent, inside) if inside else parent
                (parent,) = self.hashes(view[start : start + size], follows)
                out.append(parent)
            return out
        for start in range(0, len(view) - size + 1, size):
            # Most of the cost is SHA-256 itself; hashing the parent first and then a view copies no tokens.
            state = sha256(b"" if parent is None else parent.to_bytes(8, "big"))
            state.update(view[start : start + size])
            parent = int.from_bytes(state.digest()[:8], "big") & _TOP_BIT_CLEARED
            out.append(parent)
        return out


class SharedHashes(list[int]):
    """The hashes of the first blocks of several prompts that begin alike. Each prompt may extend them up to `limit`."""

    __slots__ = ("limit",)

    def __init__(self, known: Iterable[int] = (), *, limit: int) -> None:
        super().__init__(known)
        self.limit = limit


class BlockChain(Sequence[int]):
    """A prompt's block hashes, as a sequence that hashes a block when it is first read.

    Lookups stop at the first block that no pod holds, and so does hashing.
    """

    __slots__ = ("_data", "_hashes", "_processor", "_salt_parent", "_shared", "_size", "media")

    def __init__(
        self,
        processor: TokenBlockProcessor,
        data: bytes,
        size: int,
        salt_parent: int | None,
        hashes: SharedHashes,
        media: Sequence[Medium] = (),
    ) -> None:
        self.media = media
        """The prompt's images, audio and video, in ascending order."""
        self._processor = processor
        self._data = data
        self._salt_parent = salt_parent
        self._hashes: list[int] = hashes
        self._shared = hashes.limit
        self._size = size

    def __len__(self) -> int:
        return self._size

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._processor.block_size

    @property
    def tokens(self) -> int:
        """How many tokens of the prompt are known here: all of them, unless the chain is bounded."""
        return len(self._data) // 4

    @property
    def is_salted(self) -> bool:
        """Whether the prompt has a cache salt."""
        return self._salt_parent is not None

    def head(self, tokens: int) -> bytes:
        """The first tokens, in the form of `token_bytes`."""
        return self._data[: tokens * 4]

    def end_key(self, blocks: int) -> int:
        """The key of the ends that lie in the block after the first `blocks` blocks (`TokenBlockProcessor.end`)."""
        if blocks:
            return self[blocks - 1]
        return ROOT if self._salt_parent is None else self._salt_parent

    def end(self, length: int, ahead: int = 0) -> int:
        """The hash of the end of the first `length` tokens, which counts `ahead` tokens that follow as well."""
        size = self._processor.block_size
        blocks = (length - 1) // size
        view = memoryview(self._data)
        media = media_in(self.media, blocks * size, length + ahead) if self.media else ()
        return self._processor.end(
            self.end_key(blocks), view[blocks * size * 4 : length * 4], view[length * 4 : (length + ahead) * 4], media
        )

    @property
    def hashed(self) -> int:
        """Number of blocks hashed so far."""
        return min(len(self._hashes), self._size)

    def tail(self, blocks: int, engine_block: int) -> tuple[int, int] | None:
        """The number and the hash of the tokens of an engine block beyond the first `blocks` blocks (see `overhang`).

        None if the engine block does not extend beyond them, or if the prompt ends within it.
        """
        tokens = self._processor.overhang(blocks, engine_block)
        if tokens is None:
            return None
        start = blocks * self._processor.block_size
        data = memoryview(self._data)[start * 4 : (start + tokens) * 4]
        if len(data) < tokens * 4:
            return None
        media = media_in(self.media, start, start + tokens) if self.media else ()
        return tokens, self._processor.tail(data, self[blocks - 1], media)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            positions = range(self._size)[index]
            if positions:
                self._extend(max(positions[0], positions[-1]) + 1)
            return [self._hashes[position] for position in positions]
        if index < 0:
            index += self._size
        if not 0 <= index < self._size:
            raise IndexError(index)
        if index >= len(self._hashes):
            self._extend(index + 1)
        return self._hashes[index]

    def __iter__(self) -> Iterator[int]:
        return (self[i] for i in range(self._size))

    def _extend(self, count: int) -> None:
        known = len(self._hashes)
        if count <= known:
            return
        if known < self._shared < count:
            self._extend(self._shared)
            known = self._shared
        if count > self._shared:
            self._hashes, self._shared = list(self._hashes), self._size  # further hashes belong to this prompt only
        size = self._processor.block_size * 4
        parent = self._hashes[-1] if known else self._salt_parent
        data = memoryview(self._data)[known * size : count * size]
        media = media_in(self.media, known * size // 4, count * size // 4) if self.media else ()
        self._hashes += self._processor.hashes(data, parent, media)
