"""KV cache events in the wire format of vLLM 0.32 and 0.33: maps tagged `type`, in a batch that is an array.

Names and order of the fields are vLLM's. `encode` returns the payload of one ZMQ message.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

Medium: TypeAlias = Literal["GPU", "CPU"]


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="BlockStored"):
    """Consecutive blocks of one chain became reusable. `token_ids` has the tokens of all of them.

    Windows and states may leave out blocks: then there are fewer hashes than blocks, or none.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: Medium = "GPU"
    lora_name: str | None = None
    extra_keys: list[tuple[str | tuple[str, int], ...] | None] | UnsetType | None
    """One entry per block: what its hash covers besides tokens. A cache salt is in the first block's only, and media are
    pairs of name and beginning, counted from the block's."""
    group_idx: int = 0
    kv_cache_spec_kind: str | None = "full_attention"
    kv_cache_spec_sliding_window: int | UnsetType = UNSET
    lookahead_token_ids: list[list[int]] | UnsetType = UNSET
    """Since 0.33, for each block: the tokens after it that its hash covers, too."""


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="BlockRemoved"):
    """One copy of each of these blocks was evicted. Other copies may still serve hits."""

    block_hashes: list[int]
    medium: Medium = "GPU"
    group_idx: int = 0


class AllBlocksCleared(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="AllBlocksCleared"):
    """The cache was cleared."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """The changes of one engine step, in order. `ts` is Unix time in seconds."""

    ts: float
    events: list[Event]
    data_parallel_rank: int = 0


def encode(batch: EventBatch) -> bytes:
    """Encode the batch as msgpack."""
    return msgspec.msgpack.encode(batch)
