"""Hashes within the blocks of the primary group, and what comes before them."""

from __future__ import annotations

from typing import Any

import pytest

from matrixinfer.blocks import TokenBlockProcessor, token_bytes
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.groups import START
from matrixinfer.kvevents.predecessors import Predecessors
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.wire import BlockStored, decode

from .support import frame, stored

MODEL = "llama"
BLOCKS = TokenBlockProcessor(8)
PROMPT = list(range(100, 132))


@pytest.fixture
def known() -> Predecessors:
    """The primary group holds blocks of 8 tokens, 10 and 20 of one prompt, and 11 with the same first half as 10."""
    forest, predecessors = Forest(), Predecessors(MODEL)
    for ids, tokens in (([10, 20], PROMPT[:16]), ([11], [*PROMPT[:4], 7, 7, 7, 7])):
        forest.extend(Run(BLOCKS, model=MODEL, block_size=8), ids, token_bytes(tokens))
    predecessors.forest = forest
    return predecessors


def learn(known: Predecessors, event: dict[str, Any], *, tokens: list[int], parent: int | None = None) -> list[int]:
    read = decode(frame(event)).events[0]
    assert isinstance(read, BlockStored)
    return list(known.learn(read, [int(block) for block in event["block_hashes"]], parent, token_bytes(tokens)))


def test_the_primary_group_knows_its_own_blocks(known: Predecessors) -> None:
    assert (known.before(20, 8), known.before(10, 8), known.before(20, 16)) == (10, START, START)
    assert known.before(99, 8) is None


def test_a_hash_that_one_prompt_shows_is_found_on_another_with_the_same_tokens(known: Predecessors) -> None:
    assert (known.before(10, 4), known.before(11, 4)) == (None, None)
    assert sorted(learn(known, stored([5, 11], [*PROMPT[:4], 7, 7, 7, 7]), tokens=[*PROMPT[:4], 7, 7, 7, 7])) == []
    assert sorted(learn(known, stored([5], PROMPT[:4]), tokens=PROMPT[:4])) == []
    assert (known.before(10, 4), known.before(11, 4), known.before(5, 4)) == (5, 5, START)


def test_who_waits_for_a_hash_learns_of_it(known: Predecessors) -> None:
    learn(known, stored([77], [1, 2, 3, 4]), tokens=[1, 2, 3, 4])
    assert known.before(10, 4) is None
    assert learn(known, stored([5], PROMPT[:4]), tokens=PROMPT[:4]) == [10]


def test_other_salts_and_adapters_have_other_hashes(known: Predecessors) -> None:
    learn(known, stored([5], PROMPT[:4], extra_keys=[["tenant"]]), tokens=PROMPT[:4])
    learn(known, stored([6], PROMPT[:4], lora_name="ad", extra_keys=[["ad"]]), tokens=PROMPT[:4])
    learn(known, stored([7], PROMPT[:4], extra_keys=[[["image", 0]]]), tokens=PROMPT[:4])
    assert known.before(10, 4) is None


def test_sparse_blocks_follow_each_other_only_where_their_ends_say_so(known: Predecessors) -> None:
    assert list(known.consecutive([5, 10, 6, 20], 4)) == [(5, 10), (10, 6), (6, 20)]
    assert list(known.consecutive([10, 20], 4)) == []
    assert list(known.consecutive([10, 20], 8)) == [(10, 20)]
    assert list(known.consecutive([10, 6, 20], 2)) == [(6, 20)]  # what is missing lies after the first
    assert list(known.consecutive([1, 2], 4)) == [(1, 2)]


def test_what_lies_between_two_known_blocks_is_learnt(known: Predecessors) -> None:
    learn(known, stored([5], PROMPT[:4]), tokens=PROMPT[:4])
    assert known.before(20, 4) is None
    assert list(known.deduce([10, 6, 20], 4)) == [20]
    assert known.before(20, 4) == 6


def test_with_tokens_that_decide_as_well_the_same_block_has_several_hashes(known: Predecessors) -> None:
    known.lookahead = 1
    learn(known, stored([5], PROMPT[:4], lookahead_token_ids=[[PROMPT[4]]]), tokens=PROMPT[:4])
    learn(known, stored([6], PROMPT[:4], lookahead_token_ids=[[7]]), tokens=PROMPT[:4])
    assert (known.before(10, 4), known.before(11, 4)) == (5, 6)


def test_what_is_remembered_is_bounded(known: Predecessors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.predecessors._MOST", 4)
    for block in range(100, 120):
        learn(known, stored([block], [block] * 4), tokens=[block] * 4)
    assert (known.before(100, 4), known.before(119, 4)) == (None, START)
    known.reset()
    assert known.before(119, 4) is None
