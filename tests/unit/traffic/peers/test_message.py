from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.traffic.peers.message import (
    MAX_BYTES,
    MAX_ENDPOINTS,
    MAX_NAME,
    MAX_PROMPTS,
    Load,
    MalformedMessage,
    Prompt,
    decode,
    encode,
    length_limit,
)

CHAIN = [1, 2**63 - 1, 2**64 - 1]
LOAD = {"pod-0": Load(3, 70_000), "pod-1@dp1": Load(1, 0)}


def test_an_encoded_message_is_decoded() -> None:
    prompts = [Prompt("pod-0", "m", False, CHAIN, 1), Prompt("pod-1@dp1", "lora", True, CHAIN)]
    prompts.append(Prompt("pod-0", "m", True, CHAIN, by_bytes=True))
    data, left_out = encode("g", LOAD, prompts)
    message = decode(data)
    assert (message.gateway, message.load, left_out) == ("g", LOAD, 0)
    assert [(each.endpoint, each.model, each.computed, each.blocks, each.by_bytes) for each in message.sent] == [
        ("pod-0", "m", False, CHAIN[1:], False),
        ("pod-1@dp1", "lora", True, CHAIN, False),
        ("pod-0", "m", True, CHAIN, True),
    ]


def test_messages_of_earlier_releases_are_read() -> None:
    message = decode(msgspec.msgpack.encode({"gateway": "g", "load": {}, "sent": [["a", "m", True, bytes(8)]]}))
    assert not message.sent[0].by_bytes


def test_unknown_fields_are_ignored() -> None:
    fields = {
        "gateway": "g",
        "load": {"a": [1, 2, "more"]},
        "sent": [["a", "m", True, bytes(8), False, 7]],
        "new": {"x": 1},
    }
    message = decode(msgspec.msgpack.encode(fields))
    assert (message.load["a"], message.sent[0].blocks) == (Load(1, 2), [0])


@pytest.mark.parametrize(
    "fields",
    [
        {"gateway": ""},
        {"gateway": "g" * 65},
        {"load": {"a": [-1, 0]}},
        {"load": {"a": [0, 1 << 41]}},
        {"load": {"a" * (MAX_NAME + 1): [1, 1]}},
        {"load": {str(i): [1, 1] for i in range(MAX_ENDPOINTS + 1)}},
        {"sent": [["a", "m", True, bytes(9)]]},
        {"sent": [["a", "m", True, bytes(8)]] * (MAX_PROMPTS + 1)},
        {"sent": [["a", "m", True, bytes(8 * 131_072)]]},
    ],
    ids=["no-id", "long-id", "negative", "huge", "long-name", "endpoints", "half-a-block", "prompts", "bytes"],
)
def test_values_out_of_bounds_are_malformed(fields: dict[str, object]) -> None:
    with pytest.raises(MalformedMessage):
        decode(msgspec.msgpack.encode({"gateway": "g", "load": {}, "sent": []} | fields))


def test_a_message_cut_at_any_byte_is_malformed() -> None:
    data, _ = encode("g", LOAD, [Prompt("pod-0", "m", False, CHAIN)])
    for end in range(len(data)):
        with pytest.raises(MalformedMessage):
            decode(data[:end])


def test_a_message_with_any_byte_changed_is_valid_or_malformed() -> None:
    data, _ = encode("g", LOAD, [Prompt("pod-0", "m", False, CHAIN)])
    malformed = 0
    for position in range(len(data)):
        for value in range(256):
            try:
                message = decode(data[:position] + bytes([value]) + data[position + 1 :])
            except MalformedMessage:
                malformed += 1
            else:
                assert all(isinstance(block, int) for sent in message.sent for block in sent.blocks)
    assert malformed > len(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    with suppress(MalformedMessage):
        decode(data)


def test_deep_nesting_is_malformed() -> None:
    with pytest.raises(MalformedMessage):
        decode(b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0")


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(0, 100))
def test_all_prompts_are_cut_to_the_largest_limit_that_fits(lengths: Sequence[int], budget: int) -> None:
    limit = length_limit(lengths, budget)
    fits = [cut for cut in range(max(lengths, default=0) + 1) if sum(min(each, cut) for each in lengths) <= budget]
    assert limit == max(fits)


def test_the_longest_prompts_are_cut_and_counted() -> None:
    short, long = Prompt("a", "m", False, range(10)), Prompt("b", "m", True, range(200_000))
    data, left_out = encode("g", LOAD, [long, short, long])
    message = decode(data)
    assert MAX_BYTES - 100 < len(data) <= MAX_BYTES
    assert left_out == 2
    assert [len(each.blocks) for each in message.sent][1] == 10
    assert 65_000 < len(message.sent[0].blocks) == len(message.sent[2].blocks)
    assert message.sent[0].blocks == list(range(len(message.sent[0].blocks)))


def test_prompts_beyond_the_bound_or_with_too_long_names_are_left_out() -> None:
    prompts = [Prompt("a" * (MAX_NAME + 1), "m", False, CHAIN), *[Prompt("a", "m", False, CHAIN)] * MAX_PROMPTS]
    data, left_out = encode("g", {}, prompts)
    assert len(decode(data).sent) == MAX_PROMPTS - 1
    assert left_out == 2


def test_the_most_loaded_endpoints_are_published() -> None:
    load = {f"{number:0{MAX_NAME}}": Load(number, 0) for number in range(2 * MAX_ENDPOINTS)}
    data, _ = encode("g", load, [Prompt("a", "m", False, CHAIN)])
    message = decode(data)
    assert len(data) <= MAX_BYTES
    assert len(message.sent) == 1
    published = sorted(each.in_flight for each in message.load.values())
    assert published == list(range(2 * MAX_ENDPOINTS))[-len(published) :]
    assert len(published) > 500
