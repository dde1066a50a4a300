"""The conversations of the head to head: the same for a seed, and of the size that its engines are made for."""

from __future__ import annotations

import msgspec
from bench.head_to_head.workload import conversations
from bench.peers.load import Load


def test_conversations_are_the_same_for_a_seed_and_share_system_prompts_within_their_group() -> None:
    talk = conversations(7)
    assert talk == conversations(7)
    assert talk != conversations(8)
    assert len(talk) == 24
    assert len({each.turns[0][0]["content"] for each in talk}) == 4


def test_each_turn_continues_the_one_before_it() -> None:
    for each in conversations(1):
        assert len(each.turns) == len(each.thinks) >= 5
        for before, after in zip(each.turns, each.turns[1:], strict=False):
            assert after[: len(before)] == before
            assert [message["role"] for message in after[len(before) :]] == ["assistant", "user"]


def test_prompts_have_about_two_thousand_tokens() -> None:
    lengths = [sum(len(message["content"]) for message in turn) / 4 for each in conversations(7) for turn in each.turns]
    assert 120 <= len(lengths) <= 180
    assert 1_200 <= sum(lengths) / len(lengths) <= 2_600


def test_no_body_of_a_load_is_sent_twice_unless_its_conversation_grows() -> None:
    new = Load(case="new", kib=2, requests=6)
    bodies = [*new.bodies(1), *new.bodies(2)]
    assert len(set(bodies)) == len(bodies) == 12
    growing = Load(case="growing", kib=2, requests=6, turns=3)
    first, second, third, *_ = (msgspec.json.decode(body)["messages"] for body in growing.bodies(1))
    assert second[: len(first)] == first
    assert third[: len(second)] == second
    assert len(third) == len(first) + 4
