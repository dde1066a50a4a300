"""One request's tokens, the hashes of its blocks, and the cache blocks that it uses, as in vLLM."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from hashlib import sha256

from msgspec import UNSET

from matrixinfer.blocks import TokenIds
from matrixinfer.sim.attention import Group
from matrixinfer.sim.events import BlockStored
from matrixinfer.sim.media import MediumRun, extra_keys
from matrixinfer.sim.prefix_cache import Adapter


class Sequence:
    """Hashes every `block_size` tokens. A hash names the whole prefix with its media, and `lookahead` tokens after it.

    It uses the blocks of one or more attention groups. Block 0 stands for a block that is not there (vLLM's null block).
    """

    __slots__ = (
        "adapter",
        "allocated",
        "block_size",
        "blocks",
        "hashes",
        "junction",
        "lookahead",
        "media",
        "prompt",
        "salt",
        "states",
        "stored",
        "tokens",
    )

    def __init__(
        self,
        tokens: TokenIds,
        block_size: int,
        salt: str | None = None,
        adapter: Adapter | None = None,
        *,
        groups: int = 1,
        lookahead: int = 0,
        media: Items[MediumRun] = (),
    ) -> None:
        self.tokens = array("I", tokens.astype("u4", copy=False).tobytes())
        self.block_size = block_size
        self.salt = salt
        self.adapter = adapter
        self.lookahead = lookahead
        self.media = media
        self.prompt = len(self.tokens)
        self.junction = 0
        """Where, at the last lookup, a prefix ended that only some groups have; 0 for nowhere."""
        self.hashes: list[int] = []
        self.blocks: list[list[int]] = [[] for _ in range(groups)]
        """Ids of its cache blocks in each group, in the order of the tokens."""
        self.stored = [0] * groups
        """How many of these blocks, from the start, are past being stored."""
        self.states: list[int | None] = [None] * groups
        """For mamba: the block whose state the last step read."""
        self.allocated = 0
        """Tokens that have blocks."""
        self._hash_full_blocks()

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self._hash_full_blocks()

    @property
    def hashed(self) -> int:
        """Tokens that are part of a hash."""
        return len(self.hashes) * self.block_size

    def hash_at(self, end: int) -> int:
        """The hash of the first `end` tokens."""
        return self.hashes[end // self.block_size - 1]

    def forget_blocks(self) -> None:
        """It uses none any more."""
        groups = len(self.blocks)
        self.blocks, self.stored, self.states = [[] for _ in range(groups)], [0] * groups, [None] * groups
        self.allocated = 0

    def stored_event(
        self, first: int, last: int, group: Group | None = None, number: int = 0, kept: Items[int] | None = None
    ) -> BlockStored:
        """The event that the blocks [first, last) of a group were stored, or of those only the blocks `kept`."""
        group = group or Group(block_size=self.block_size)
        size, kept = group.block_size, range(first, last) if kept is None else kept
        ends = [(block + 1) * size for block in kept]
        return BlockStored(
            block_hashes=[self.hash_at(end) for end in ends],
            parent_block_hash=self.hash_at(first * size) if first else None,
            token_ids=self.tokens[first * size : last * size].tolist(),
            block_size=size,
            lora_id=None if self.adapter is None else self.adapter.number,
            lora_name=None if self.adapter is None else self.adapter.name,
            extra_keys=[self._extra_keys(block * size, size) for block in kept] or UNSET,
            group_idx=number,
            kv_cache_spec_kind=group.kind,
            kv_cache_spec_sliding_window=group.window or UNSET,
            lookahead_token_ids=self._ahead(ends) if self.lookahead else UNSET,
        )

    def _extra_keys(self, start: int, size: int) -> tuple[str | tuple[str, int], ...] | None:
        """What the hash of the block at `start` covers besides tokens, in vLLM's order."""
        name = () if self.adapter is None else (self.adapter.name,)
        salt = () if self.salt is None or start else (self.salt,)
        return (*name, *extra_keys(self.media, start, start + size + self.lookahead), *salt) or None

    def _ahead(self, ends: list[int]) -> list[list[int]]:
        return [self.tokens[end : end + self.lookahead].tolist() for end in ends]

    def _hash_full_blocks(self) -> None:
        size, first, ahead = self.block_size, len(self.hashes), self.lookahead
        full = (len(self.tokens) - ahead) // size
        if full <= first:
            return
        data = memoryview(self.tokens[first * size : full * size + ahead].tobytes())
        parent = self.hashes[-1].to_bytes(8, "little") if first else self._seed()
        for start in range(0, (full - first) * size * 4, size * 4):
            state = sha256(parent)
            state.update(data[start : start + (size + ahead) * 4])
            if self.media:
                at = first * size + start // 4
                keys = extra_keys(self.media, at, at + size + ahead)
                state.update(repr(keys).encode() if keys else b"")
            parent = state.digest()[:8]
            self.hashes.append(int.from_bytes(parent, "little"))

    def _seed(self) -> bytes:
        return b"" if self.salt is None and self.adapter is None else repr((self.adapter, self.salt)).encode()
