import gzip
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from matrixinfer.blocks import token_bytes
from matrixinfer.kvevents.wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    MalformedFrame,
    block_id,
    decode,
    tokens_of,
)

from .support import CLEARED, frame, removed, stored

CAPTURES = Path(__file__).parents[2] / "data" / "captures"


def recorded_frames(name: str) -> list[bytes]:
    with gzip.open(CAPTURES / name, "rt") as lines:
        return [bytes.fromhex(row["payload_hex"]) for row in map(json.loads, lines) if row["kind"] == "event"]


def only_stored(**fields: Any) -> BlockStored:
    (event,) = decode(frame({**stored([11], [1, 2, 3, 4]), **fields})).events
    assert isinstance(event, BlockStored)
    return event


def test_events_come_in_their_order_with_every_field() -> None:
    payload = frame(
        removed([5, 6], group_idx=1),
        stored([11, 12], [1, 2, 3, 4], parent=7, lora_id=1, lora_name="poet", extra_keys=[["poet"], None], group_idx=0),
        CLEARED,
        rank=3,
    )
    batch = decode(payload)
    gone, kept, cleared = batch.events
    assert (batch.rank, batch.unreadable) == (3, 0)
    assert gone == BlockRemoved(block_hashes=[5, 6], medium="GPU", group_idx=1)
    assert cleared == AllBlocksCleared()
    assert isinstance(kept, BlockStored)
    assert (kept.block_hashes, kept.parent_block_hash, kept.block_size) == ([11, 12], 7, 2)
    assert (kept.lora_id, kept.lora_name, kept.medium, kept.group_idx) == (1, "poet", "GPU", 0)
    assert kept.extra_keys == [["poet"], None]
    assert tokens_of(kept) == token_bytes([1, 2, 3, 4])


def test_fields_that_an_engine_leaves_out_are_absent() -> None:
    event = {"type": "BlockStored", "block_hashes": [11], "token_ids": [1, 2], "block_size": 2}
    (kept,) = decode(msgspec.msgpack.encode([1.5, [event]])).events
    assert isinstance(kept, BlockStored)
    assert (kept.parent_block_hash, kept.medium, kept.extra_keys, kept.group_idx) == (None, None, None, None)


def test_hashes_may_be_integers_of_64_bits_or_byte_strings() -> None:
    digest = bytes(range(32))
    event = only_stored(block_hashes=[2**64 - 1, digest, 0], parent_block_hash=digest)
    assert event.block_hashes == [2**64 - 1, digest, 0]
    assert event.parent_block_hash == digest
    assert [block_id(name) for name in event.block_hashes] == [2**64 - 1, 0x18191A1B1C1D1E1F, 0]


def test_unknown_fields_pass() -> None:
    fields = {"locality": "local", "session_id": None, "ownership": {"a": [1]}, "kv_cache_spec_sliding_window": 128}
    assert only_stored(**fields).block_hashes == [11]
    longer = msgspec.msgpack.encode([1.5, [{**CLEARED, "why": "reset"}], 0, "something new"])
    assert decode(longer).events == [AllBlocksCleared()]


@pytest.mark.parametrize(
    "odd",
    [
        {"type": "BlockMoved", "block_hashes": [1]},
        {"block_hashes": [1]},
        {"type": "BlockRemoved"},
        {"type": "BlockRemoved", "block_hashes": "abc"},
        {"type": "BlockStored", "block_hashes": [None], "token_ids": [1], "block_size": 1},
        {"type": "BlockStored", "block_hashes": [1], "token_ids": [1], "block_size": "1"},
        {"type": 7},
        ["BlockRemoved", [1]],
        "text",
        None,
        5,
    ],
)
def test_an_event_that_cannot_be_read_costs_only_itself(odd: object) -> None:
    batch = decode(frame(removed([1]), odd, removed([2]), rank=4))
    assert batch.events == [BlockRemoved(block_hashes=[n], medium="GPU") for n in (1, 2)]
    assert (batch.unreadable, batch.rank) == (1, 4)


def test_an_event_whose_text_is_not_utf8_costs_only_itself() -> None:
    bad = frame(stored([11], [1], lora_name="????"), removed([2])).replace(b"????", b"\xff\xfe\xff\xfe")
    batch = decode(bad)
    assert batch.events == [BlockRemoved(block_hashes=[2], medium="GPU")]
    assert batch.unreadable == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\xff" * 8,
        msgspec.msgpack.encode({"ts": 1.5, "events": []}),
        msgspec.msgpack.encode([1.5]),
        msgspec.msgpack.encode(["now", []]),
        msgspec.msgpack.encode([1.5, {}]),
        msgspec.msgpack.encode([1.5, [], "rank"]),
        msgspec.msgpack.encode([1.5, []]) + b"\x00",
        b"\x92\xca\x00\x00\x00\x00" + b"\x91" * 100_000,
        b"\x92\xca\x00\x00\x00\x00\xdd\xff\xff\xff\xff",
    ],
)
def test_what_is_no_batch_is_a_malformed_frame(payload: bytes) -> None:
    with pytest.raises(MalformedFrame):
        decode(payload)


def survive(payload: bytes) -> None:
    """Decode all there is to decode; nothing but `MalformedFrame` may come out."""
    try:
        batch = decode(payload)
    except MalformedFrame:
        return
    for event in batch.events:
        if isinstance(event, BlockStored):
            tokens_of(event)


@pytest.mark.parametrize("name", ["capture.jsonl.gz", "capture-v028-bs16.jsonl.gz", "capture-lora.jsonl.gz"])
def test_recorded_frames_are_read_whole(name: str) -> None:
    for payload in recorded_frames(name):
        batch = decode(payload)
        assert batch.unreadable == 0
        assert all(tokens_of(event) is not None for event in batch.events if isinstance(event, BlockStored))


def small_frame() -> bytes:
    """A recorded frame with several kinds of events, not too long to be tried at every byte."""
    frames = [frame for frame in recorded_frames("capture.jsonl.gz") if b"BlockRemoved" in frame and len(frame) < 3000]
    return max(frames, key=len)


def test_a_frame_cut_anywhere_is_malformed() -> None:
    payload = small_frame()
    for length in range(len(payload)):
        with pytest.raises(MalformedFrame):
            decode(payload[:length])


def test_a_frame_with_any_byte_changed_raises_nothing_else() -> None:
    payload = small_frame()
    for position in range(len(payload)):
        for flip in (0x01, 0x80, 0xFF, payload[position] ^ 0xC1):
            survive(payload[:position] + bytes([payload[position] ^ flip]) + payload[position + 1 :])


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": [1, 2, 3]},
        {"token_ids": [1, 2, 3, 4, 5]},
        {"token_ids": []},
        {"token_ids": [1, 2, 3, -1]},
        {"token_ids": [1, 2, 3, 2**32]},
        {"token_ids": [1, 2, 3, "4"]},
        {"token_ids": [1, 2, 3, [4, 5]]},
        {"token_ids": None},
        {"token_ids": "1234"},
    ],
)
def test_tokens_that_do_not_fit_their_blocks_are_none(fields: dict[str, object]) -> None:
    assert tokens_of(only_stored(**fields)) is None


def test_tokens_are_packed_as_they_are_hashed() -> None:
    tokens = [0, 1, 0x01020304, 2**32 - 1]
    assert tokens_of(only_stored(token_ids=tokens)) == token_bytes(tokens)
