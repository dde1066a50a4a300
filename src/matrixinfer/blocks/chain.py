"""One prompt's block hashes, and what else lookups ask about the prompt's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from matrixinfer.blocks.names import ROOT, Medium, media_in

if TYPE_CHECKING:
    from matrixinfer.blocks.processor import TokenBlockProcessor


class SharedHashes(list[int]):
    """The hashes of the first blocks of several prompts that begin alike. Each prompt may extend them up to `limit`."""

    __slots__ = ("limit",)

    def __init__(self, known: Iterable[int] = (), *, limit: int) -> None:
        super().__init__(known)
        self.limit = limit


class BlockChain(list[int]):
    """A prompt's block hashes, which nobody changes. `data` are its tokens in the form of `token_bytes`.

    `media` are the prompt's images, audio and video, in ascending order.
    """

    __slots__ = ("_data", "_processor", "_salt_parent", "media")

    def __init__(
        self,
        processor: TokenBlockProcessor,
        data: bytes,
        salt_parent: int | None,
        hashes: Iterable[int],
        media: Sequence[Medium] = (),
    ) -> None:
        super().__init__(hashes)
        self.media = media
        self._processor = processor
        self._data = data
        self._salt_parent = salt_parent

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
