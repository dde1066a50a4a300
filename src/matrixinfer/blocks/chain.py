"""One prompt's block hashes, computed as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

from matrixinfer.blocks.names import ROOT, Medium, media_in

if TYPE_CHECKING:
    from matrixinfer.blocks.processor import TokenBlockProcessor


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
