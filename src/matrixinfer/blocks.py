"""Token ids to block hashes: the names under which the index knows a prompt's blocks.

A prompt is cut into blocks of `block_size` tokens; only full blocks count. Two schemes:

`prefix` (default): a block's hash covers everything before it, as a KV block does::

    h[i] = u64(SHA-256(h[i-1] as 8 bytes big endian ‖ tokens as u32 big endian)[:8]) with the top bit cleared

Block 0 has no parent bytes. A cache salt takes the parent's place at block 0 (`salt_parent`).

`block`: each block is hashed alone, as block 0 is above. This is what existing MatrixInfer and kthena writers put into
Redis. Equal blocks after different prefixes collide, so matches are hints; salted prompts never match.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = npt.NDArray[np.uint32]
"""Token ids, shape (n,), one unsigned 32-bit id per token."""

Scheme: TypeAlias = Literal["prefix", "block"]

_TOP_BIT_CLEARED = (1 << 63) - 1


def salt_parent(salt: str) -> int:
    """The parent hash that a cache salt gives to block 0: no prompt without that salt shares a block with it."""
    return int.from_bytes(sha256(b"salt\0" + salt.encode()).digest()[:8], "big") & _TOP_BIT_CLEARED


def token_bytes(tokens: TokenIds | Sequence[int]) -> bytes:
    """Token ids as the bytes that are hashed: four each, big endian.

    Raises `OverflowError` for ids that do not fit 32 unsigned bits, `TypeError` for what is no integer or an array of
    another type.
    """
    if not isinstance(tokens, np.ndarray):
        tokens = np.array(array("I", tokens))  # checks each id, and three times as fast as numpy does it
    elif tokens.dtype != np.uint32:
        raise TypeError(f"expected an array of uint32, got {tokens.dtype}")
    return tokens.astype(">u4").tobytes()


class TokenBlockProcessor:
    """Cuts token ids into full blocks of `block_size` tokens and names each by its hash."""

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
        max_blocks: int | None = None,
        hashes: SharedHashes | None = None,
    ) -> BlockChain:
        """The prompt's block hashes, computed only as far as they are read.

        `max_blocks` bounds the chain. Under scheme `block` a salted prompt has no blocks, as it can match none.
        `hashes` are those of its first blocks, as far as they are known; they are extended by what is computed.
        """
        blocks = len(tokens) // self.block_size
        if max_blocks is not None:
            blocks = min(blocks, max_blocks)
        if salt is not None and self.scheme == "block":
            blocks = 0
        used = tokens[: (blocks + 1) * self.block_size]
        return BlockChain(
            self,
            token_bytes(used),
            blocks,
            None if salt is None else salt_parent(salt),
            SharedHashes(limit=blocks) if hashes is None else hashes,
        )

    def overhang(self, blocks: int, engine_block: int) -> int | None:
        """Tokens by which an engine block of `engine_block` tokens reaches beyond the first `blocks` token blocks.

        None unless it begins before their end and ends within the next one: then the token blocks alone tell whether
        an engine holds it. Else its tail (see `tail`) does.
        """
        over = -(blocks * self.block_size) % engine_block
        return over if 0 < over < self.block_size and self.scheme == "prefix" else None

    def tail(self, data: bytes | bytearray | memoryview, parent: int) -> int:
        """The hash of less than a block of tokens that follow the block `parent`."""
        state = sha256(parent.to_bytes(8, "big"))
        state.update(data)
        return int.from_bytes(state.digest()[:8], "big") & _TOP_BIT_CLEARED

    def hashes(self, data: bytes | bytearray | memoryview, parent: int | None = None) -> list[int]:
        """Hashes of the full blocks in `data` (see `token_bytes`), the first of which follows the block `parent`."""
        out: list[int] = []
        size = self.block_size * 4
        view = memoryview(data)
        if self.scheme == "block":
            for start in range(0, len(view) - size + 1, size):
                digest = sha256(view[start : start + size]).digest()
                out.append(int.from_bytes(digest[:8], "big") & _TOP_BIT_CLEARED)
            return out
        for start in range(0, len(view) - size + 1, size):
            # Most of the cost is SHA-256 itself; one update per block with the parent in front copies no tokens.
            state = sha256(b"" if parent is None else parent.to_bytes(8, "big"))
            state.update(view[start : start + size])
            parent = int.from_bytes(state.digest()[:8], "big") & _TOP_BIT_CLEARED
            out.append(parent)
        return out


class SharedHashes(list[int]):
    """The first block hashes of prompts that begin alike, which each of them extends, up to `limit`."""

    __slots__ = ("limit",)

    def __init__(self, known: Iterable[int] = (), *, limit: int) -> None:
        super().__init__(known)
        self.limit = limit


class BlockChain(Sequence[int]):
    """A prompt's block hashes as a sequence that hashes a block when it is first read.

    Look-ups stop at the first block that nobody holds, and so does the hashing.
    """

    __slots__ = ("_data", "_hashes", "_processor", "_salt_parent", "_shared", "_size")

    def __init__(
        self, processor: TokenBlockProcessor, data: bytes, size: int, salt_parent: int | None, hashes: SharedHashes
    ) -> None:
        self._processor = processor
        self._data = data
        self._salt_parent = salt_parent
        self._hashes: list[int] = hashes
        self._shared = hashes.limit
        self._size = size

    def __len__(self) -> int:
        return self._size

    @property
    def hashed(self) -> int:
        """How many blocks have been hashed so far."""
        return min(len(self._hashes), self._size)

    def tail(self, blocks: int, engine_block: int) -> tuple[int, int] | None:
        """Tokens and hash of what an engine block reaches beyond the first `blocks` blocks (`overhang`).

        None where it does not, or where the prompt ends within it.
        """
        tokens = self._processor.overhang(blocks, engine_block)
        if tokens is None:
            return None
        start = blocks * self._processor.block_size
        data = memoryview(self._data)[start * 4 : (start + tokens) * 4]
        return (tokens, self._processor.tail(data, self[blocks - 1])) if len(data) == tokens * 4 else None

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
            self._hashes, self._shared = list(self._hashes), self._size  # what follows is this prompt's own
        size = self._processor.block_size * 4
        parent = self._hashes[-1] if known else self._salt_parent
        self._hashes += self._processor.hashes(memoryview(self._data)[known * size : count * size], parent)
