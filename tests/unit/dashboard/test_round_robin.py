"""The estimate of what round robin would have found, against caches that are played through in full."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

import pytest

from matrixinfer.dashboard.round_robin import ENDPOINTS, MODELS, PREFIXES, UNKNOWN_TOKENS, RoundRobin
from matrixinfer.scheduler.framework import Candidate, Condition, Decision, SchedulingRequest

BLOCK = 16


def decision(chain: Sequence[int], *, pods: int, cache: int | None = None, model: str = "m") -> Decision:
    candidates = [
        Candidate(name=f"{model}-{at}", url="", condition=Condition(cache_tokens=cache)) for at in range(pods)
    ]
    return Decision(
        request=SchedulingRequest(
            id="r", model=model, prompt_tokens=len(chain) * BLOCK, block_size=BLOCK, chain=chain, prefix=b""
        ),
        candidates=candidates,
        ranked=candidates[::-1],
        filtered={},
        scores={},
        totals={},
        timings_ms={},
    )


class Exact:
    """Every pod's cache, block by block."""

    def __init__(self, pods: int, blocks: int) -> None:
        self.caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(pods)]
        self.blocks = blocks
        self.turn = 0

    def hit(self, chain: Sequence[int]) -> int:
        self.turn += 1
        cache = self.caches[self.turn % len(self.caches)]
        hit = 0
        while hit < len(chain) and chain[hit] in cache:
            hit += 1
        for each in reversed(chain):
            cache.pop(each, None)
            cache[each] = None
        while len(cache) > self.blocks:
            cache.popitem(last=False)
        return min(hit, len(chain) - 1) * BLOCK


def test_a_prompt_is_found_where_its_turn_brought_it_before() -> None:
    robin, chain = RoundRobin(), list(range(64))
    assert [robin.hit(decision(chain, pods=2)) for _ in range(4)] == [0, 0, 896, 896]  # of 1,024: never the last place


@pytest.mark.parametrize(("pods", "cache_blocks"), [(1, 4_000), (2, 6_000), (4, 3_000), (8, 1_500)])
def test_the_estimate_is_near_the_truth(pods: int, cache_blocks: int) -> None:
    draw, robin, exact = random.Random(pods), RoundRobin(), Exact(pods, cache_blocks)
    systems = [[draw.getrandbits(60) for _ in range(96)] for _ in range(4)]
    talks = [list(draw.choice(systems)) for _ in range(40)]
    hits = tokens = truth = all_tokens = 0
    for _ in range(4_000):
        at = draw.randrange(len(talks))
        talks[at] += [draw.getrandbits(60) for _ in range(draw.randint(8, 40))]
        found = robin.hit(decision(talks[at], pods=pods, cache=cache_blocks * BLOCK))
        truth += exact.hit(talks[at])
        all_tokens += len(talks[at]) * BLOCK
        if found is not None:
            hits += found
            tokens += len(talks[at]) * BLOCK
        if len(talks[at]) > 400:
            talks[at] = list(draw.choice(systems))
    assert hits / tokens == pytest.approx(truth / all_tokens, abs=0.05)


def test_few_endpoints_stand_for_all_of_them() -> None:
    robin, chain = RoundRobin(), list(range(64))
    followed = [robin.hit(decision(chain, pods=50)) is not None for _ in range(500)]
    assert sum(followed) == 10 * ENDPOINTS


def test_memory_is_bounded() -> None:
    robin, draw = RoundRobin(), random.Random(1)
    for _ in range(3_000):
        robin.hit(decision([draw.getrandbits(60) for _ in range(2_000)], pods=3))
    assert len(robin) <= ENDPOINTS * UNKNOWN_TOKENS // 128
    for number in range(2 * MODELS):
        robin.hit(decision([1] * 8, pods=1, model=f"other-{number}"))
    assert len(robin.models) == MODELS


def test_prefixes_are_bounded_over_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matrixinfer.dashboard.round_robin.PREFIXES", 300)
    robin, draw = RoundRobin(), random.Random(1)
    for _ in range(50):
        for number in range(10):
            robin.hit(decision([draw.getrandbits(60) for _ in range(100)], pods=2, model=f"m{number}"))
    assert 200 < len(robin) <= 300
    assert PREFIXES > 100_000


def test_nothing_is_kept_of_a_pod_that_has_gone() -> None:
    robin, chain = RoundRobin(), list(range(64))
    for _ in range(4):
        robin.hit(decision(chain, pods=2))
    assert len(robin)
    robin.forget("m-0")
    robin.forget("m-1")
    robin.forget("m-1")
    assert (len(robin), robin.models) == (0, {})


def test_a_prompt_without_token_ids_has_no_turn() -> None:
    robin = RoundRobin()
    assert robin.hit(decision([], pods=2)) is None
