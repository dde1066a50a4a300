"""`matrixinfer explain --follow`: which decisions are printed, and how."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from matrixinfer.cli.follow import LIMIT, Follower, follow, heading, line
from tests.waiting import eventually


def decision(number: int, *, is_over: bool = True, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "at": 1000.0 + number,
        "chosen": "pod-a",
        "reason": "the only pod of this model",
        "tokens": 300,
        "predicted_hit_tokens": 256,
        "ttft_ms": 12.5,
        "is_over": is_over,
        "reported": {"attempts": ["pod-a"], "status": 200, "prompt_tokens": 300, "cached_tokens": 256},
    } | changes


def ids(follower: Follower, *decisions: dict[str, Any]) -> list[str]:
    return [each["id"] for each in follower.take(decisions[::-1])[0]]


def test_each_decision_is_printed_once_when_its_answer_has_ended() -> None:
    follower = Follower(20)
    first, second, third = decision(1), decision(2, is_over=False), decision(3)
    assert ids(follower, first, second, third) == ["r1", "r3"]
    assert ids(follower, first, second, third) == []
    assert ids(follower, second | {"is_over": True}, third, decision(4, is_over=False)) == ["r2"]


def test_a_request_id_that_comes_again_is_another_decision() -> None:
    follower = Follower(20)
    assert ids(follower, decision(1)) == ["r1"]
    assert ids(follower, decision(1), decision(1, at=2000.0)) == ["r1"]


def test_at_first_only_some_of_the_past_is_printed() -> None:
    follower = Follower(2)
    assert ids(follower, *(decision(number) for number in range(9))) == ["r7", "r8"]
    assert ids(follower, *(decision(number) for number in range(10))) == ["r9"]


def test_it_is_said_when_more_came_than_were_asked_for() -> None:
    follower = Follower(20)
    assert follower.take([decision(number) for number in range(LIMIT, 0, -1)])[1] is False
    assert follower.take([decision(number) for number in range(2 * LIMIT, LIMIT, -1)])[1] is True
    assert follower.take([decision(number) for number in range(2 * LIMIT + 5, LIMIT + 5, -1)])[1] is False


def test_memory_is_bounded() -> None:
    follower = Follower(20)
    for number in range(5_000):
        follower.take([decision(number)])
    assert len(follower._printed) == 2 * LIMIT  # noqa: SLF001


def test_a_line_has_the_columns_of_the_heading() -> None:
    assert heading().split() == [
        "at",
        "id",
        "pod",
        "tokens",
        "predicted_hit_tokens",
        "cached_tokens",
        "ttft_ms",
        "status",
        "reason",
    ]
    assert line(decision(1)).split()[1:8] == ["r1", "pod-a", "300", "256", "256", "12.5", "200"]
    moved = decision(1, ttft_ms=None) | {
        "reported": {"attempts": ["pod-a", "pod-b"], "status": None, "prompt_tokens": None, "cached_tokens": None}
    }
    assert line(moved).split()[1:8] == ["r1", "pod-b", "300", "-", "-", "-", "-"]
    assert "\x1b" not in line(decision(1, id="\x1b[2J"))


@pytest.mark.parametrize("as_json", [False, True])
async def test_decisions_are_printed_until_it_is_stopped(as_json: bool, capfdbinary: Any) -> None:
    answers: list[Sequence[dict[str, Any]]] = [[], [decision(1)], [decision(2), decision(1)]]

    async def ask() -> Sequence[dict[str, Any]]:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    printed = b""
    task = asyncio.create_task(follow(ask, first=20, as_json=as_json, every=0.01))

    def has_both() -> bool:
        nonlocal printed
        printed += capfdbinary.readouterr().out
        return b"r2" in printed

    try:
        await eventually(has_both)
    finally:
        task.cancel()
        await asyncio.wait([task])
    lines = printed.decode().splitlines()
    if as_json:
        assert [json.loads(each)["id"] for each in lines] == ["r1", "r2"]
    else:
        assert [each.split()[1] for each in lines] == ["id", "r1", "r2"]
