"""A short soak, and what makes a soak fail. `make soak` is the long one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.soak.clients import Tally
from tests.soak.report import MORE_DESCRIPTORS, MORE_MEMORY_BYTES, MORE_TASKS, Result, Sample, show
from tests.soak.run import soak

GOOD = Sample(memory_bytes=100_000_000, descriptors=40, tasks=14, in_flight=0)


def result(*samples: Sample) -> Result:
    return Result(seconds=1, clients=1, index="memory", rounds=[[each] for each in samples], longest_pauses=[{}])


def tally(**outcomes: int) -> Tally:
    return Tally(outcomes=Counter({("chat", outcome): number for outcome, number in outcomes.items()}))


@pytest.mark.parametrize("samples", [[GOOD] * 3, [GOOD, Sample(memory_bytes=0, descriptors=9, tasks=9, in_flight=0)]])
def test_what_is_back_where_it_began_passes(samples: list[Sample]) -> None:
    assert list(result(*samples).complaints(tally(answered=99, failed=1, left=50))) == []


@pytest.mark.parametrize(
    ("worse", "word"),
    [
        (
            Sample(memory_bytes=GOOD.memory_bytes, descriptors=41 + MORE_DESCRIPTORS, tasks=14, in_flight=0),
            "descriptors",
        ),
        (Sample(memory_bytes=GOOD.memory_bytes, descriptors=40, tasks=15 + MORE_TASKS, in_flight=0), "tasks"),
        (Sample(memory_bytes=GOOD.memory_bytes, descriptors=40, tasks=14, in_flight=1), "requests in flight"),
        (Sample(memory_bytes=106_000_000 + MORE_MEMORY_BYTES, descriptors=40, tasks=14, in_flight=0), "memory"),
    ],
)
def test_what_is_left_behind_fails(worse: Sample, word: str) -> None:
    (complaint,) = result(GOOD, GOOD, worse).complaints(tally(answered=1))
    assert word in complaint


def test_one_large_sample_is_no_trend() -> None:
    peak = Sample(memory_bytes=200_000_000, descriptors=40, tasks=14, in_flight=0)
    rounds = [GOOD] * 9
    rounds[7] = peak
    assert list(result(*rounds).complaints(tally(answered=1))) == []
    assert any("memory" in each for each in result(*[GOOD] * 6, *[peak] * 3).complaints(tally(answered=1)))


def test_lost_requests_fail() -> None:
    assert list(result(GOOD, GOOD).complaints(tally(answered=90, failed=10)))
    lost = Tally(wrong=["chat: no end after 60 s"])
    assert list(result(GOOD, GOOD).complaints(lost)) == lost.wrong
    dead = result(GOOD, GOOD)
    dead.dead = [0]
    assert list(dead.complaints(tally(answered=1))) == ["gateway 0 has ended"]


@pytest.mark.slow
@pytest.mark.parametrize("redis", [False, True], ids=["memory", "redis"])
async def test_nothing_is_lost_and_nothing_is_left_behind(tmp_path: Path, redis: bool) -> None:
    found, of = await soak(
        tmp_path, seconds=15, clients=50, rounds=1, redis=redis, least_answered=0.9
    )  # few requests, many faults
    print("\n".join(show(found, of)))
    assert list(found.complaints(of)) == []
    assert of.sent > 500
    assert len(found.faults) > 2, found.faults
