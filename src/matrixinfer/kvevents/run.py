"""Consecutive engine blocks, and the token blocks that their tokens make."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from struct import Struct

from matrixinfer.blocks import ROOT, Medium, TokenBlockProcessor, media_in
from matrixinfer.kvevents.tokens import Tokens

pack_id = Struct("<Q").pack
"""An engine block as eight bytes, as in `Run.ids`."""


class Run:
    """Consecutive engine blocks of one chain: a mutable record that only the forest and the ledger change.

    It grows at its end like a chain, and shrinks there as the engine evicts. Offsets count tokens from the chain's root.
    `tokens` and `names` (of the token blocks completed) begin at `base`, the last token-block boundary at or before
    `start`.
    """

    __slots__ = (
        "_blocks",
        "base",
        "block_size",
        "ids",
        "media",
        "model",
        "names",
        "number",
        "parent",
        "seed",
        "start",
        "tokens",
    )

    def __init__(
        self,
        blocks: TokenBlockProcessor,
        *,
        model: str,
        block_size: int,
        parent: int | None = None,
        start: int = 0,
        seed: int | None = None,
    ) -> None:
        self._blocks = blocks
        self.model = model
        self.block_size = block_size
        self.parent = parent
        """The block that the run follows; None at the root."""
        self.start = start
        self.base = start // blocks.block_size * blocks.block_size
        self.seed = seed
        """The hash that the token block at `base` chains to: a token block's or a salt's; None for neither."""
        self.number = -1
        self.ids = bytearray()
        """The blocks, eight bytes each."""
        self.tokens = Tokens()
        self.media: tuple[Medium, ...] = ()
        """The media that begin among `tokens`, in ascending order; positions count from the chain's root."""
        self.names = array("Q")
        """Not a list: the garbage collector visits every element of a list, which takes 10 ms for a million."""

    def __len__(self) -> int:
        return len(self.ids) // 8

    def __getitem__(self, position: int) -> int:
        return int.from_bytes(self.ids[8 * position : 8 * position + 8], "little")

    def __iter__(self) -> Iterator[int]:
        return iter(array("Q", bytes(self.ids)))

    def ends_with(self, block: int) -> bool:
        """Whether `block` is the last block."""
        return self.ids.endswith(pack_id(block))

    def shared_end(self, ids: bytes, count: int) -> int:
        """How many of the last blocks are the last of the first `count` in `ids`, in the same order."""
        most = min(count, len(self.ids) // 8)
        end = 8 * count
        equal, step = 0, 1
        while equal < most:  # steps double while all is equal, and begin again below one that is not
            length = min(equal + step, most)
            if self.ids.endswith(ids[end - 8 * length : end - 8 * equal], None, len(self.ids) - 8 * equal):
                equal, step = length, 2 * step
            elif step == 1:
                break
            else:
                most, step = length - 1, 1
        return equal

    def position(self, block: int) -> int:
        """The position of `block` in the run. Raises `ValueError` if it is not there."""
        key = pack_id(block)
        at = len(self.ids) - 8 if self.ids.endswith(key) else self.ids.index(key)
        while at % 8:  # the same bytes across two blocks
            at = self.ids.index(key, at + 1)
        return at // 8

    def append(self, ids: Sequence[int], tokens: bytes | bytearray, media: Sequence[Medium] = ()) -> None:
        """Append blocks and their tokens, and name the token blocks that they complete.

        `media` begin among them, counted from their first token.
        """
        if media:
            end = self.base + self.tokens.count
            self.media += tuple((end + start, name) for start, name in media)
        self.ids += array("Q", ids).tobytes()
        self.tokens.append(tokens)
        size, done, count = self._blocks.block_size, len(self.names), self.tokens.count
        if count - done * size < size:
            return
        parent = self.names[-1] if done else self.seed
        unnamed = self._media_in(done * size, count) if self.media else ()
        with self.tokens.since(done * size) as view:
            self.names.extend(self._blocks.hashes(view, parent, unnamed))
        self.tokens.page(len(self.names) * size)

    def branch(self, position: int, block_size: int) -> Run:
        """An empty run of blocks of `block_size`, which follows the block at `position`."""
        start = self._end_of(position)
        run = Run(self._blocks, model=self.model, block_size=block_size, parent=self[position], start=start)
        completed = (run.base - self.base) // self._blocks.block_size
        run.seed = self.names[completed - 1] if completed else self.seed
        run.tokens.append(self.tokens.part(run.base - self.base, start - self.base))
        if self.media:
            run.media = tuple(medium for medium in self.media if run.base <= medium[0] < start)
        return run

    def like(self, above: Run | None, parent: int | None) -> Run:
        """The run that copies of this one's blocks join, after `parent` in the run `above`, or at the root (None)."""
        if above is None or parent is None:
            return Run(self._blocks, model=self.model, block_size=self.block_size, seed=self.seed)
        if above.block_size == self.block_size and above.ends_with(parent):
            return above
        return above.branch(above.position(parent), self.block_size)

    def tokens_of(self, position: int) -> bytes:
        """The tokens of one block."""
        end = self._end_of(position) - self.base
        return self.tokens.part(end - self.block_size, end)

    def media_of(self, position: int) -> Sequence[Medium]:
        """The media that begin in one block, counted from its first token."""
        end = self._end_of(position)
        return media_in(self.media, end - self.block_size, end) if self.media else ()

    def _media_in(self, first: int, last: int) -> Sequence[Medium]:
        """The media that begin at those of `tokens`, counted from the first of them."""
        return media_in(self.media, self.base + first, self.base + last) if self.media else ()

    def split(self, position: int) -> Run:
        """Keep the blocks up to `position`; return those after it as a run that follows."""
        rest = self.branch(position, self.block_size)
        at = rest.start - self.base
        count = self.tokens.count
        rest.append(list(self)[position + 1 :], self.tokens.part(at, count), self._media_in(at, count))
        del self.ids[8 * position + 8 :]
        self.truncate()
        return rest

    def truncate(self) -> None:
        """Drop the tokens and names after the last block."""
        length, size = self._end_of(len(self) - 1) - self.base, self._blocks.block_size
        self.tokens.cut(length, length // size * size)
        del self.names[length // size :]
        if self.media:
            self.media = tuple(medium for medium in self.media if medium[0] < self.base + length)

    @property
    def recorded(self) -> int:
        """The number of blocks whose tokens are kept: between a removal and `truncate`, more than there are blocks."""
        return (self.base + self.tokens.count - self.start) // self.block_size

    def completed(self, first: int, last: int) -> tuple[int | None, list[int]]:
        """The token block before those that end in the engine blocks [first, last) (None: the root), and those."""
        size = self._blocks.block_size
        low, high = (self._end_of(first - 1) - self.base) // size, (self._end_of(last - 1) - self.base) // size
        parent = self.names[low - 1] if low else self.seed if self.base else None
        return parent, self.names[low:high].tolist()

    def before(self, position: int) -> tuple[int | None, bytes]:
        """What precedes the block at `position`: the name of the last full token block, and the tokens after it.

        Without a full token block the name is the salt's, or None if there is no salt.
        """
        end = self._end_of(position - 1) - self.base
        size = self._blocks.block_size
        name = self.names[end // size - 1] if end >= size else self.seed
        return name, self.tokens.part(end // size * size, end)

    def end(self, position: int) -> int:
        """How many tokens a prefix has that ends with the block at `position`."""
        return self._end_of(position)

    def ending(self, position: int) -> tuple[int, bytes, Sequence[Medium]]:
        """Key, last tokens and media of the prefix that ends with the block at `position`.

        They are what `TokenBlockProcessor.end` takes.
        """
        size, end = self._blocks.block_size, self._end_of(position)
        start = (end - 1) // size * size
        named = (start - self.base) // size
        key = self.names[named - 1] if named else self.seed
        first, last = start - self.base, end - self.base
        return ROOT if key is None else key, self.tokens.part(first, last), self._media_in(first, last)

    @property
    def has_tails(self) -> bool:
        """Whether engine blocks and token blocks straddle each other."""
        size = self._blocks.block_size
        return size % self.block_size != 0 and self.block_size % size != 0

    def tails(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(token block, tail) for each of the engine blocks [first, last) with a tail, which follows that token block."""
        size, step = self._blocks.block_size, self.block_size
        for end in range(self._end_of(first), self._end_of(last), step):
            over = end % size
            if end < size or over != self._blocks.overhang(end // size, step):
                continue
            at = end - self.base
            before = self.names[at // size - 1] if at >= size else self.seed
            if before is not None:
                own = self.tokens.part(at - over, at)
                yield before, self._blocks.tail(own, before, self._media_in(at - over, at))

    def _end_of(self, position: int) -> int:
        """The offset of the end of the engine block at `position`."""
        return self.start + (position + 1) * self.block_size
