"""Bytes of a KV event batch to typed events.

The layout is that of vLLM 0.24 and later: a msgpack array `[timestamp, events, data_parallel_rank?]` whose events are
maps tagged by `type`. Unknown fields pass; an event that cannot be read is counted and skipped, so that the rest of
its batch still counts; a payload that is no batch at all is a `MalformedFrame`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

from matrixinfer.errors import MatrixInferError

EngineHash: TypeAlias = int | bytes
"""An engine's name for one of its blocks: opaque, a u64 or a byte string."""


class MalformedFrame(MatrixInferError):
    """The payload is not a batch of KV events."""


class BlockStored(msgspec.Struct, frozen=True, tag_field="type", tag="BlockStored"):
    """The engine cached `block_hashes`, consecutive blocks after `parent_block_hash`."""

    block_hashes: list[EngineHash]
    token_ids: msgspec.Raw
    """The blocks' tokens one after another; decoded by `tokens_of` when needed."""
    block_size: int
    parent_block_hash: EngineHash | None = None
    lora_id: int | None = None
    lora_name: str | None = None
    medium: str | None = None
    extra_keys: list[Any] | None = None
    """Per block None or what else its content depends on: adapter, multimodal items, salt, embeddings (untagged)."""
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag_field="type", tag="BlockRemoved"):
    """The engine dropped one copy of each of `block_hashes`."""

    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag_field="type", tag="AllBlocksCleared"):
    """The engine dropped every block."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True):
    """The events of one frame, in order, and how many could not be read."""

    events: Sequence[Event]
    rank: int | None
    unreadable: int = 0


class _Typed(msgspec.Struct, array_like=True):
    timestamp: float
    events: list[Event]
    rank: int | None = None


class _Untyped(msgspec.Struct, array_like=True):
    timestamp: float
    events: list[msgspec.Raw]
    rank: int | None = None


_TYPED = msgspec.msgpack.Decoder(_Typed)
_UNTYPED = msgspec.msgpack.Decoder(_Untyped)
_EVENT: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_TOKENS = msgspec.msgpack.Decoder(list[int])


def decode(payload: bytes) -> Batch:
    """Decode one batch. Raises `MalformedFrame`."""
    try:
        batch = _TYPED.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(payload)
    return Batch(batch.events, batch.rank)


def tokens_of(event: BlockStored) -> bytes | None:
    """The event's tokens as `blocks.token_bytes` gives them; None when they do not fit its block count and size."""
    try:
        tokens = _TOKENS.decode(event.token_ids)
        if len(tokens) != len(event.block_hashes) * event.block_size:
            return None
        packed = array("I", tokens)
    except (msgspec.MsgspecError, OverflowError, RecursionError):
        return None
    packed.byteswap()
    return packed.tobytes()


def block_id(engine_hash: EngineHash) -> int:
    """One integer per engine block: the hash itself, or the last eight bytes of a byte string, as vLLM shortens it."""
    return engine_hash if isinstance(engine_hash, int) else int.from_bytes(engine_hash[-8:], "big")


def _decode_leniently(payload: bytes) -> Batch:
    """Event by event, so that one which cannot be read costs only itself."""
    try:
        batch = _UNTYPED.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(str(error)) from error
    events: list[Event] = []
    for raw in batch.events:
        try:
            events.append(_EVENT.decode(raw))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
    return Batch(events, batch.rank, unreadable=len(batch.events) - len(events))
