import gzip
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from matrixinfer.blocks import token_bytes
from matrixinfer.kvevents.wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    MalformedFrame,
    block_ids,
    decode,
    is_hash_of_tokens_alone,
    pairs_of,
    plain,
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
    assert (kept.parent_block_hash, kept.medium, kept.extra_keys, kept.group_idx) == (None, None, UNSET, None)


TOKENS = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("array", "medium", "adapter", "extra_keys", "group"),
    [
        (["BlockStored", [-5], 7, TOKENS, 4, None], None, UNSET, UNSET, None),  # SGLang
        (["BlockStored", [5], 7, TOKENS, 4, None, "GPU"], "GPU", UNSET, UNSET, None),  # vLLM 0.12, SGLang
        (["BlockStored", [5], 7, TOKENS, 4, 1, "GPU", "poet"], "GPU", "poet", UNSET, None),  # vLLM 0.16
        (["BlockStored", [5], 7, TOKENS, 4, 1, "GPU", "poet", [["poet"]], 1], "GPU", "poet", [["poet"]], 1),  # 0.20
        (
            ["BlockStored", [5], 7, TOKENS, 4, None, "GPU", None, None, 0, "full_attention", 9, "new"],
            "GPU",
            None,
            None,
            0,
        ),
    ],
)
def test_events_that_are_arrays_are_recognised_by_their_length(
    array: list[object], medium: str | None, adapter: object, extra_keys: object, group: int | None
) -> None:
    batch = decode(frame(array, ["BlockRemoved", [6], "CPU"], ["AllBlocksCleared"]))
    kept, gone, cleared = batch.events
    assert batch.unreadable == 0
    assert isinstance(kept, BlockStored)
    assert (kept.block_hashes, kept.parent_block_hash, kept.block_size) == (array[1], 7, 4)
    assert (kept.medium, kept.lora_name, kept.extra_keys, kept.group_idx) == (medium, adapter, extra_keys, group)
    assert tokens_of(kept) == token_bytes(TOKENS)
    assert isinstance(gone, BlockRemoved)
    assert (gone.block_hashes, gone.medium, gone.group_idx) == ([6], "CPU", None)
    assert isinstance(cleared, AllBlocksCleared)


def test_an_array_whose_fields_have_other_types_is_not_guessed() -> None:
    salted = ["BlockStored", [5], 7, TOKENS, 4, None, "GPU", 8]
    batch = decode(frame(salted))
    assert (batch.events, batch.unreadable, batch.unreadable_stored) == ([], 1, 1)


@pytest.mark.parametrize("others", [[], [5]])
def test_the_map_at_the_end_of_an_array_is_read(others: list[object]) -> None:
    said = {"cache_salt": "s", "lora_name": "ad", "session_id": "x", "new": 1}
    event = ["BlockStored", [5], 7, TOKENS, 4, 1, "GPU"]
    batch = decode(frame([*event, said], [*event, {}], event, *others))
    salted, empty, bare = batch.events
    assert isinstance(salted, BlockStored)
    assert isinstance(empty, BlockStored)
    assert isinstance(bare, BlockStored)
    assert (salted.salt, salted.lora_name, salted.hides_keys, salted.is_of_radix_tree) == ("s", "ad", False, True)
    assert (salted.block_hashes, salted.parent_block_hash, salted.block_size, salted.medium) == ([5], 7, 4, "GPU")
    assert (empty.salt, empty.lora_name, empty.is_annotated) == (None, None, True)
    assert (bare.hides_keys, bare.is_annotated) == (True, False)
    assert (plain(bare).hides_keys, plain(bare).is_of_radix_tree) == (False, True)


@pytest.mark.parametrize(
    ("event", "stored"),
    [
        (["BlockStored", "?"], 1),
        ({"type": "BlockStored", "block_hashes": "?"}, 1),
        (["BlockRemoved", "?"], 0),
        ({"type": "BlockRemoved"}, 0),
        ([], 0),
        (5, 0),
    ],
)
def test_unreadable_events_that_only_add_blocks_are_counted_apart(event: object, stored: int) -> None:
    batch = decode(frame(event))
    assert (batch.unreadable, batch.unreadable_stored) == (1, stored)


@pytest.mark.parametrize("layout", ["v012", "v016", "v020", "v024", "mapbatch"])
def test_one_recording_reads_alike_in_every_layout(layout: str) -> None:
    for original, payload in zip(
        recorded_frames("capture.jsonl.gz"), recorded_frames(f"capture-as-{layout}.jsonl.gz"), strict=True
    ):
        expected, batch = decode(original), decode(payload)
        assert (batch.timestamp, batch.rank, batch.unreadable) == (expected.timestamp, expected.rank, 0)
        assert list(map(essence, batch.events)) == list(map(essence, expected.events))


def essence(event: Event) -> tuple[object, ...]:
    """What every layout says of an event."""
    if isinstance(event, BlockStored):
        return event.block_hashes, event.parent_block_hash, tokens_of(event), event.block_size, event.medium
    return (event.block_hashes, event.medium) if isinstance(event, BlockRemoved) else ()


def test_a_batch_may_be_a_map() -> None:
    batch = decode(msgspec.msgpack.encode({"ts": 1.5, "events": [removed([1]), 5], "data_parallel_rank": 3, "new": 1}))
    assert (list(map(essence, batch.events)), batch.rank, batch.unreadable) == ([([1], "GPU")], 3, 1)


def test_blocks_named_by_pythons_hash_of_their_tokens_are_recognised() -> None:
    assert is_hash_of_tokens_alone(only_stored(block_hashes=[hash(tuple(TOKENS))], token_ids=TOKENS))
    assert not is_hash_of_tokens_alone(only_stored(block_hashes=[12], token_ids=TOKENS))
    assert not is_hash_of_tokens_alone(only_stored(block_hashes=[12], token_ids=None))


def test_pairs_are_the_tokens_of_their_blocks_and_the_token_after_each() -> None:
    pairs = [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert pairs_of(only_stored(token_ids=pairs, block_size=4)) == (token_bytes([1, 2, 3, 4]), [token_bytes([5])])
    assert pairs_of(only_stored(token_ids=pairs, block_size=3)) is None
    assert pairs_of(only_stored(token_ids=[(1, 2**32)] * 4, block_size=4)) is None
    assert pairs_of(only_stored(token_ids=TOKENS)) is None
    assert pairs_of(only_stored(token_ids=[])) is None


def test_hashes_may_be_integers_of_64_bits_or_byte_strings() -> None:
    digest = bytes(range(32))
    event = only_stored(block_hashes=[2**64 - 1, digest, 0], parent_block_hash=digest)
    assert event.block_hashes == [2**64 - 1, digest, 0]
    assert event.parent_block_hash == digest
    assert block_ids(event.block_hashes) == [2**64 - 1, 0x18191A1B1C1D1E1F, 0]
    assert block_ids([1, -1, -(2**63)]) == [1, 2**64 - 1, 2**63]
    assert block_ids([]) == []


def test_unknown_fields_pass() -> None:
    fields = {"locality": "local", "session_id": None, "ownership": {"a": [1]}, "kv_cache_spec_sliding_window": 128}
    assert only_stored(**fields).block_hashes == [11]
    longer = msgspec.msgpack.encode([1.5, [{**CLEARED, "why": "reset"}], 0, "something new"])
    assert decode(longer).events == [AllBlocksCleared()]


@pytest.mark.parametrize(
    "odd",
    [
        {"block_hashes": [1]},
        {"type": "BlockRemoved"},
        {"type": "BlockRemoved", "block_hashes": "abc"},
        {"type": "BlockStored", "block_hashes": [None], "token_ids": [1], "block_size": 1},
        {"type": "BlockStored", "block_hashes": [1], "token_ids": [1], "block_size": "1"},
        {"type": 7},
        ["BlockRemoved"],
        ["BlockRemoved", "abc"],
        [],
        "text",
        None,
        5,
    ],
)
def test_an_event_that_cannot_be_read_costs_only_itself(odd: object) -> None:
    batch = decode(frame(removed([1]), odd, removed([2]), rank=4))
    assert batch.events == [BlockRemoved(block_hashes=[n], medium="GPU") for n in (1, 2)]
    assert (batch.unreadable, batch.rank) == (1, 4)


@pytest.mark.parametrize("odd", [{"type": "BlockMoved", "block_hashes": [1]}, ["BlockMoved", [1]]])
def test_events_of_an_unknown_type_are_named(odd: object) -> None:
    batch = decode(frame(removed([1]), odd, ["BlockRemoved"], removed([2])))
    assert batch.events == [BlockRemoved(block_hashes=[n], medium="GPU") for n in (1, 2)]
    assert (batch.unknown, batch.unreadable, batch.unreadable_stored) == (("BlockMoved",), 1, 0)


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
        msgspec.msgpack.encode({"ts": 1.5}),
        msgspec.msgpack.encode({"events": []}),
        msgspec.msgpack.encode({"ts": 1.5, "events": {}}),
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
            pairs_of(event)
            is_hash_of_tokens_alone(event)
            block_ids(event.block_hashes)


@pytest.mark.parametrize("name", ["capture.jsonl.gz", "capture-v028-bs16.jsonl.gz", "capture-lora.jsonl.gz"])
def test_recorded_frames_are_read_whole(name: str) -> None:
    for payload in recorded_frames(name):
        batch = decode(payload)
        assert batch.unreadable == 0
        assert all(tokens_of(event) is not None for event in batch.events if isinstance(event, BlockStored))


def small_frame(name: str) -> bytes:
    """A recorded frame with several kinds of events, not too long to be tried at every byte."""
    frames = [frame for frame in recorded_frames(name) if b"BlockRemoved" in frame and len(frame) < 3000]
    return max(frames, key=len)


@pytest.mark.parametrize("layout", ["v012", "v016", "v020", "v024", "mapbatch"])
def test_a_frame_cut_anywhere_is_malformed(layout: str) -> None:
    payload = small_frame(f"capture-as-{layout}.jsonl.gz")
    for length in range(len(payload)):
        with pytest.raises(MalformedFrame):
            decode(payload[:length])


@pytest.mark.parametrize("layout", ["v012", "v020", "v024", "mapbatch"])
def test_a_frame_with_any_byte_changed_raises_nothing_else(layout: str) -> None:
    payload = small_frame(f"capture-as-{layout}.jsonl.gz")
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
def test_tokens_that_do_not_fit_their_blocks_are_rejected(fields: dict[str, object]) -> None:
    assert tokens_of(only_stored(**fields)) is None


def test_tokens_are_packed_as_they_are_hashed() -> None:
    tokens = [0, 1, 0x01020304, 2**32 - 1]
    assert tokens_of(only_stored(token_ids=tokens)) == token_bytes(tokens)
