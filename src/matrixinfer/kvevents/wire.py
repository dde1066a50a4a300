"""Decodes batches of KV events to typed events, in every layout that engines use.

A batch is a msgpack array `[timestamp, events, rank?]` or a map of the same; an event is a map tagged by `type` (vLLM
from 0.24 on) or an array that begins with its type (vLLM before, SGLang). Arrays grew at their end from release to
release, so one type reads them all::

    ["BlockStored", hashes, parent, tokens, block_size, lora_id    SGLang
     , medium                                                      vLLM 0.12, SGLang
     , {cache_salt, lora_name, …}                                  SGLang, where there is something to say
     , lora_name                                                   vLLM 0.16
     , extra_keys, group_idx, …]                                   vLLM 0.20

A new layout is one more pair of batch and event types below. Unknown fields are ignored. An event that cannot be read is
counted and skipped, so that the rest of its batch still counts, and so is one of an unknown type, which is named. A
payload that is not a batch raises `MalformedFrame`.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, cast

import msgspec
from msgspec import UNSET, UnsetType

from matrixinfer.errors import UNREADABLE, MatrixInferError

EngineHash: TypeAlias = int | bytes
"""An engine's opaque name for one of its blocks: a 64-bit integer (signed in SGLang) or a byte string."""


LONG_FRAME_BYTES = 32 * 1024
"""Longer batches are decoded and applied in slices."""
MAX_EVENTS = 1_000_000
MAX_EVENT_TOKENS = 4_000_000
"""More tokens than any model's context has."""
_EVENTS_AT_ONCE = 64
_LONG_EVENT_BYTES = 64 * 1024


class MalformedFrame(MatrixInferError):
    """The payload is not a batch of KV events."""


# Events hold no cycles: left out of garbage collection, a frame with hundreds of thousands of them pauses the loop less.


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="type", tag="BlockStored"):
    """The engine stored `block_hashes`, consecutive blocks after `parent_block_hash`."""

    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None = None
    token_ids: msgspec.Raw
    """The blocks' tokens one after another; decoded by `tokens_of` when needed."""
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | UnsetType | None = UNSET
    """UNSET if the layout does not have it, or leaves it out where it says nothing."""
    extra_keys: list[Any] | UnsetType | None = UNSET
    """What else the content of each block depends on: adapter, multimodal items, salt, embeddings (untagged), or None.

    None if no block has any; UNSET if the layout does not have it.
    """
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    """The window of such attention, in tokens."""
    lookahead_token_ids: list[list[int]] | None = None
    """For each block the tokens after it on which its content depends as well (speculative decoding, vLLM 0.33)."""
    cache_salt: str | None = None
    """SGLang's: of all the blocks."""
    mm_keys: list[Any] | None = None
    """TensorRT-LLM's: the multimodal items in each block."""

    @property
    def window(self) -> int | None:
        """Tokens of a sliding window, where the layout says it."""
        return self.kv_cache_spec_sliding_window

    @property
    def lookahead(self) -> list[list[int]] | None:
        """`lookahead_token_ids`, where the layout has them."""
        return self.lookahead_token_ids

    @property
    def salt(self) -> str | None:
        """`cache_salt`, where the layout has it."""
        return self.cache_salt

    @property
    def hides_keys(self) -> bool:
        """The layout does not have what else the content of blocks depends on."""
        return False

    @property
    def is_annotated(self) -> bool:
        """An array with a map at its end: without it, neither salt nor adapter is left unsaid."""
        return False

    @property
    def is_of_tensorrt(self) -> bool:
        """The layout is TensorRT-LLM's: that of a radix tree, but nothing is left out, not even an adapter that is nil."""
        return (
            self.extra_keys is UNSET
            and self.lora_name is None
            and self.medium == "GPU"
            and self.is_of_radix_tree
            and not self.is_annotated
        )

    @property
    def is_of_radix_tree(self) -> bool:
        """The layout is SGLang's: a page is on a medium or not, and its hash says neither salt nor adapter."""
        return (
            self.extra_keys is UNSET
            and self.kv_cache_spec_kind is None
            and self.group_idx is None
            and not self.hides_keys
        )


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="type", tag="BlockRemoved"):
    """The engine removed one copy of each block in `block_hashes`."""

    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False, tag_field="type", tag="AllBlocksCleared"):
    """The engine removed every block."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True):
    """The events of one frame, in order, and how many could not be read."""

    events: Sequence[Event]
    timestamp: float
    """Seconds since the epoch, on the engine's clock."""
    rank: int | None
    unreadable: int = 0
    unreadable_stored: int = 0
    """How many of the unreadable events are BlockStored: blocks stay unknown, but no known block was removed."""
    unknown: tuple[str, ...] = ()
    """The types of events that no layout has; they are not among the unreadable ones."""


class _StoredArray(BlockStored, frozen=True, kw_only=True, array_like=True):
    lora_name: str | dict[str, Any] | UnsetType | None = UNSET  # type: ignore[assignment]  # until it is `_annotated`
    extra_keys: list[Any] | UnsetType | None = UNSET
    # Fields of maps only. What an array has in their places is unknown, and means nothing.
    kv_cache_spec_sliding_window: Any = None
    lookahead_token_ids: Any = None
    cache_salt: Any = None
    mm_keys: Any = None

    @property
    def hides_keys(self) -> bool:
        return self.extra_keys is UNSET

    @property
    def window(self) -> int | None:
        return None

    @property
    def lookahead(self) -> list[list[int]] | None:
        return None

    @property
    def salt(self) -> str | None:
        return None


class _AnnotatedArray(BlockStored, frozen=True, kw_only=True):
    @property
    def is_annotated(self) -> bool:
        return True


class _RemovedArray(BlockRemoved, frozen=True, kw_only=True, array_like=True):
    pass


class _ClearedArray(AllBlocksCleared, frozen=True, array_like=True):
    pass


_Map: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared
_Array: TypeAlias = _StoredArray | _RemovedArray | _ClearedArray


class _MapsInArray(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Map]
    data_parallel_rank: int | None = None


class _ArraysInArray(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Array]
    data_parallel_rank: int | None = None


class _MapsInMap(msgspec.Struct):
    ts: float
    events: list[_Map]
    data_parallel_rank: int | None = None


class _UnreadInArray(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _UnreadInMap(msgspec.Struct):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _OuterArray(msgspec.Struct, array_like=True):
    ts: float
    events: msgspec.Raw
    data_parallel_rank: int | None = None


class _OuterMap(msgspec.Struct):
    ts: float
    events: msgspec.Raw
    data_parallel_rank: int | None = None


_Decoders: TypeAlias = tuple[msgspec.msgpack.Decoder[Any], ...]
_BATCHES: _Decoders = tuple(map(msgspec.msgpack.Decoder, (_MapsInArray, _ArraysInArray, _MapsInMap)))
_UNREAD: _Decoders = tuple(map(msgspec.msgpack.Decoder, (_UnreadInArray, _UnreadInMap)))
_OUTER: _Decoders = tuple(map(msgspec.msgpack.Decoder, (_OuterArray, _OuterMap)))
_RAW_EVENTS = msgspec.msgpack.Decoder(list[msgspec.Raw])
_EVENTS: _Decoders = tuple(map(msgspec.msgpack.Decoder, (_Map, _Array)))
_TOKENS = msgspec.msgpack.Decoder(list[int])
_BIGRAMS = msgspec.msgpack.Decoder(list[tuple[int, int]])
_TYPES = frozenset(kind.__name__ for kind in (BlockStored, BlockRemoved, AllBlocksCleared))
_TWO_TO_64 = 1 << 64


def decode(payload: bytes) -> Batch:
    """Decode one batch. Raises `MalformedFrame`."""
    for layout in _BATCHES:
        try:
            batch = layout.decode(payload)
        except UNREADABLE:
            continue
        events = batch.events if layout is not _BATCHES[1] else _annotated(batch.events)
        return Batch(events, batch.ts, batch.data_parallel_rank)
    return _decode_one_by_one(payload)


def decoding(payload: bytes) -> Generator[None, None, Batch]:
    """Decode a long batch event by event, and return what `decode` returns. Raises `MalformedFrame`.

    Refuses batches of more than `MAX_EVENTS`; an event of more than `MAX_EVENT_TOKENS`, which no engine can compute at
    once, counts as unreadable.
    """
    for layout in _OUTER:
        try:
            outer = layout.decode(payload)
        except UNREADABLE as error:
            reason = error
            continue
        count = array_length(outer.events)
        if count is None or count > MAX_EVENTS:
            raise MalformedFrame(f"expected a list of up to {MAX_EVENTS} events")
        yield
        return (yield from _decoded(_RAW_EVENTS.decode(outer.events), outer.ts, outer.data_parallel_rank))
    raise MalformedFrame(str(reason)) from reason


def array_length(raw: msgspec.Raw) -> int | None:
    """The number of elements of an undecoded array; None if it is something else."""
    head = bytes(memoryview(raw)[:5])
    if head[:1] == b"\xdc":
        return int.from_bytes(head[1:3], "big")
    if head[:1] == b"\xdd":
        return int.from_bytes(head[1:5], "big")
    return head[0] & 0x0F if head and head[0] & 0xF0 == 0x90 else None


def _annotated(events: Sequence[Event]) -> Sequence[Event]:
    """The events, with the maps at the end of arrays read."""
    # A list, because `any` takes twice as long, and every frame comes here.
    if not [event for event in events if isinstance(event, _StoredArray) and isinstance(event.lora_name, dict)]:
        return events
    return [_with_map(event) if isinstance(event, _StoredArray) else event for event in events]


def _with_map(event: _StoredArray) -> BlockStored:
    if not isinstance(event.lora_name, dict):
        return event
    salt, adapter = event.lora_name.get("cache_salt"), event.lora_name.get("lora_name")
    return _AnnotatedArray(
        block_hashes=event.block_hashes,
        parent_block_hash=event.parent_block_hash,
        token_ids=event.token_ids,
        block_size=event.block_size,
        lora_id=event.lora_id,
        medium=event.medium,
        lora_name=adapter if isinstance(adapter, str) else None,
        cache_salt=salt if isinstance(salt, str) else None,
    )


def plain(event: BlockStored) -> BlockStored:
    """An array that hides keys, from an engine that annotates those with any: it has none."""
    return _with_map(msgspec.structs.replace(event, lora_name={})) if isinstance(event, _StoredArray) else event


def tokens_of(event: BlockStored) -> bytes | None:
    """The event's tokens as `blocks.token_bytes` packs them; None if they do not fit its block count and size."""
    try:
        tokens = _TOKENS.decode(event.token_ids)
        if len(tokens) != len(event.block_hashes) * event.block_size:
            return None
        packed = array("I", tokens)
    except (*UNREADABLE, OverflowError):
        return None
    packed.byteswap()
    return packed.tobytes()


def parent_of(event: BlockStored) -> int | None:
    """The block that the event's blocks follow; None for the root."""
    return None if event.parent_block_hash is None else block_ids([event.parent_block_hash])[0]


def pairs_of(event: BlockStored) -> tuple[bytes, list[bytes]] | None:
    """The tokens of blocks of token pairs, as SGLang publishes them when it drafts with EAGLE.

    Block `i` of `b` pairs is the tokens `t[i*b : (i+1)*b]`, and depends on the token after them. Returns the tokens of all
    blocks and, for each block, that token; None if the event has no pairs, or if they do not fit its blocks.
    """
    try:
        pairs = _BIGRAMS.decode(event.token_ids)
        if not pairs or len(pairs) != len(event.block_hashes) * event.block_size:
            return None
        first = array("I", [pair[0] for pair in pairs])
        ahead = array("I", [pairs[end - 1][1] for end in range(event.block_size, len(pairs) + 1, event.block_size)])
    except (*UNREADABLE, OverflowError):
        return None
    first.byteswap()
    ahead.byteswap()
    packed = ahead.tobytes()
    return first.tobytes(), [packed[at : at + 4] for at in range(0, len(packed), 4)]


def is_hash_of_tokens_alone(event: BlockStored) -> bool:
    """Whether the event has one block, named by Python's hash of its tokens, as in older SGLang.

    CPython hashes a tuple of integers to the same value in every process. A name that covers the preceding blocks differs.
    """
    if len(event.block_hashes) != 1:
        return False
    try:
        return hash(tuple(_TOKENS.decode(event.token_ids))) == event.block_hashes[0]
    except UNREADABLE:
        return False


def block_ids(engine_hashes: Sequence[EngineHash]) -> Sequence[int]:
    """One unsigned 64-bit integer per engine block; a byte string counts by its last eight bytes, as vLLM shortens it."""
    try:
        # The usual case takes one pass in C; mypy cannot see that comparing byte strings with 0 raises.
        if min(engine_hashes) >= 0:  # type: ignore[operator]
            return engine_hashes  # type: ignore[return-value]
    except (TypeError, ValueError):
        pass  # there are byte strings, or nothing
    return [name % _TWO_TO_64 if isinstance(name, int) else int.from_bytes(name[-8:], "big") for name in engine_hashes]


def _decode_one_by_one(payload: bytes) -> Batch:
    """Decode event by event, so that one unreadable event loses only itself."""
    for layout in _UNREAD:
        try:
            batch = layout.decode(payload)
        except UNREADABLE as error:
            reason = error
            continue
        steps = _decoded(batch.events, batch.ts, batch.data_parallel_rank)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return cast("Batch", end.value)
    raise MalformedFrame(str(reason)) from reason


def _decoded(raws: Sequence[msgspec.Raw], ts: float, rank: int | None) -> Generator[None, None, Batch]:
    """The batch of these events, decoded one by one."""
    events: list[Event] = []
    unread: list[str | None] = []
    for number, raw in enumerate(raws, 1):
        event = _decode_event(raw)
        if event is None:
            unread.append(_type_of(raw))
        elif isinstance(event, BlockStored) and (array_length(event.token_ids) or 0) > MAX_EVENT_TOKENS:
            unread.append(BlockStored.__name__)
        else:
            events.append(event)
        if number % _EVENTS_AT_ONCE == 0 or memoryview(raw).nbytes > _LONG_EVENT_BYTES:
            yield
    unknown = tuple(name for name in unread if name is not None and name not in _TYPES)
    stored = unread.count(BlockStored.__name__)
    return Batch(_annotated(events), ts, rank, len(unread) - len(unknown), stored, unknown)


def _decode_event(raw: msgspec.Raw) -> Event | None:
    for layout in _EVENTS:
        try:
            event: Event = layout.decode(raw)
        except UNREADABLE:
            continue
        return event
    return None


def _type_of(raw: msgspec.Raw) -> str | None:
    """The type of an event that cannot be read; None if that cannot be read either."""
    try:
        event = msgspec.msgpack.decode(raw)
    except UNREADABLE:
        return None
    kind = event.get("type") if isinstance(event, dict) else event[0] if isinstance(event, list) and event else None
    return kind if isinstance(kind, str) and kind else None
