"""TensorRT-LLM's stream, shaped as its source publishes it. No such engine has been tried."""

from __future__ import annotations

from typing import Any

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents import limits
from matrixinfer.kvevents.replay import Reply
from matrixinfer.kvevents.wire import BlockStored, decode

from .support import CLEARED, Follower, frame

PROMPT = list(range(100, 132))
HIGH = -(2**63) + 1
"""Hashes are signed."""


def stored(hashes: list[int], tokens: list[Any], *, parent: int | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": len(tokens) // len(hashes),
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **fields,
    }


def removed(hashes: list[int]) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"}


@pytest.fixture
def engine() -> Follower:
    return Follower(TokenBlockProcessor(4))


def test_a_stream_is_read_and_the_feed_says_that_it_is_untried(engine: Follower) -> None:
    engine.apply(stored([HIGH, 2], PROMPT[:8]), stored([3], PROMPT[8:12], parent=2))
    assert (engine.held(PROMPT), engine.ledger.block_size) == (12, 4)
    assert (engine.ledger.limits, engine.ledger.hides_salts, engine.ledger.is_exact) == ((limits.UNTRIED,), True, False)
    engine.apply(removed([3]), removed([2]))
    assert engine.held(PROMPT) == 4
    engine.apply(CLEARED, stored([HIGH], PROMPT[:4]))
    assert (engine.held(PROMPT), engine.ledger.limits) == (4, (limits.UNTRIED,))


def test_there_are_no_copies_in_its_tree(engine: Follower) -> None:
    engine.apply(stored([1, 2], PROMPT[:8]), stored([1, 2], PROMPT[:8]), removed([2]))
    assert engine.held(PROMPT) == 4


def test_adapters_without_a_name_and_multimodal_blocks_are_not_indexed(engine: Follower) -> None:
    item = {"type": "mm_key", "hash": "ab", "start_offset": 0}
    engine.apply(stored([1, 2, 3], PROMPT[:12], mm_keys=[[], [item], []]), stored([5], PROMPT[:4], lora_id=7))
    assert (engine.held(PROMPT), engine.ledger.stats.ended) == (4, 3)
    engine.apply(stored([4], PROMPT[12:16], parent=3))
    assert (engine.held(PROMPT), engine.ledger.stats.ended) == (4, 4)


def test_tokens_that_are_no_numbers_are_misfits(engine: Follower) -> None:
    engine.apply(stored([1], ["x", 1, 2, 3]), stored([2], PROMPT[:4]))
    assert (engine.held(PROMPT), engine.ledger.limits) == (4, (limits.UNTRIED, limits.MISFITS))


@pytest.mark.parametrize(
    ("fields", "is_tensorrt"),
    [({}, True), ({"medium": "CPU"}, False), ({"extra_keys": None}, False), ({"group_idx": 0}, False)],
)
def test_its_layout_is_recognised_by_what_is_there_and_what_is_not(fields: dict[str, Any], is_tensorrt: bool) -> None:
    event = decode(frame(stored([1], PROMPT[:4], **fields))).events[0]
    assert isinstance(event, BlockStored)
    assert event.is_of_tensorrt is is_tensorrt


@pytest.mark.parametrize("said", [{}, {"lora_name": "ad"}])
def test_pages_of_sglang_are_not_taken_for_its_blocks(said: dict[str, Any]) -> None:
    page = {name: value for name, value in stored([1], PROMPT[:4]).items() if name != "lora_name"}
    event = decode(frame({**page, **said})).events[0]
    assert isinstance(event, BlockStored)
    assert (event.is_of_radix_tree, event.is_of_tensorrt) == (True, False)


def test_its_replays_have_the_topic_before_the_number() -> None:
    reply, payload = Reply(), frame(stored([1], PROMPT[:4]))
    reply.take([b"", b"kv-events", (7).to_bytes(8, "big"), payload])
    reply.take([b"", b"", b"\xff" * 8, b""])
    assert (reply.frames, reply.whole, reply.malformed) == ([(7, payload)], True, 0)
