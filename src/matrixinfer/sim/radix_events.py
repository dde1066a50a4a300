"""KV cache events in the wire format of SGLang 0.5.23: maps tagged `type` without nil fields, in a batch that is an array.

Names and order of the fields are SGLang's. `encode` returns the payload of one ZMQ message.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class BlockStored(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type", tag="BlockStored"):
    """Consecutive pages of one chain became reusable. `token_ids` has the tokens of all of them, or pairs of tokens."""

    block_hashes: list[int]
    """Signed 64-bit integers."""
    parent_block_hash: int | None
    token_ids: list[int] | list[tuple[int, int]]
    block_size: int
    lora_id: int | None
    """Always None: SGLang's adapters have no numbers."""
    medium: str | None = None
    cache_salt: str | None = None
    lora_name: str | None = None

    def continues(self, before: BlockStored) -> bool:
        """Whether it can be appended to the event `before`."""
        return (
            self.parent_block_hash == before.block_hashes[-1]
            and self.cache_salt == before.cache_salt
            and self.lora_name == before.lora_name
        )


class BlockRemoved(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type", tag="BlockRemoved"):
    """These pages were evicted."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type", tag="AllBlocksCleared"):
    """The cache was cleared, or is new."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """The changes of one engine step, in order. `ts` is Unix time in seconds."""

    ts: float
    events: list[Event]
    attn_dp_rank: int = 0


def encode(batch: EventBatch) -> bytes:
    """Encode the batch as msgpack."""
    return msgspec.msgpack.encode(batch)
