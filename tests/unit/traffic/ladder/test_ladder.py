"""The ladder: what is counted, what is lost to what, and what the words say."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from matrixinfer.app.ladder_collector import LadderCollector
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.watched import WatchedIndex
from matrixinfer.traffic.ladder.record import PERIOD_SECONDS, Ended, LadderLog
from matrixinfer.traffic.ladder.reuse import ALL
from matrixinfer.traffic.ladder.rungs import Ladder, Loss, Rung
from matrixinfer.traffic.ladder.words import CAUSES

SIZE = 16
BLOCKS = [number * 7_919 + 1 for number in range(64)]


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def ended(clock: Clock, blocks: list[int], **changes: object) -> Ended:
    """A request for all of these blocks and one token more, which no pod held."""
    request = Ended(
        model="m",
        base_model="m",
        prompt_tokens=len(blocks) * SIZE + 1,
        hashes=blocks,
        block_size=SIZE,
        usable=len(blocks) * SIZE,
        held=0,
        best=0,
        predicted=0,
        decided_at=clock.now - 0.5,
        endpoint="pod-0",
        capacity=10_000,
        pods=2,
        why_gone=lambda _: "dropped",
    )
    request = replace(request, **changes)
    usable = max(request.prompt_tokens - 1, 0) // SIZE * SIZE
    return replace(request, usable=max(usable, request.best), held=max(request.held, request.best))


def run(*requests: Callable[[Clock], Ended]) -> Ladder:
    """The ladder of requests that end one second after the other."""
    clock = Clock()
    log = LadderLog(clock)
    for request in requests:
        clock.now += 1.0
        log.ended(request(clock))
    return log.since(3_600)


def rung(ladder: Ladder, name: str) -> Rung:
    return next(each for each in ladder.rungs if each.name == name)


def losses(ladder: Ladder) -> dict[str, int]:
    return {loss.name: loss.tokens for each in ladder.rungs for loss in each.losses}


def loss(ladder: Ladder, name: str) -> Loss:
    return next(found for each in ladder.rungs for found in each.losses if found.name == name)


def test_a_new_prompt_is_lost_to_nothing_but_its_newness() -> None:
    ladder = run(lambda clock: ended(clock, BLOCKS[:4]))
    assert losses(ladder) == {"new": 64, "ends": 1}
    assert [each.tokens for each in ladder.rungs] == [0, 0, 0, 0, None]
    assert ladder.prompt_tokens == 65
    assert ladder.error_share == 0.0


def test_a_prompt_that_came_before_and_is_gone_was_evicted_if_the_fleet_is_too_small() -> None:
    ladder = run(
        lambda clock: ended(clock, BLOCKS[:4], capacity=640, pods=2),
        lambda clock: ended(clock, BLOCKS[4:54], capacity=640, pods=2),
        lambda clock: ended(clock, BLOCKS[:4], capacity=640, pods=2),
    )
    assert losses(ladder)["evicted"] == 64
    assert rung(ladder, "ideal").tokens == 64
    assert rung(ladder, "capacity").tokens == 0
    remedy = loss(ladder, "evicted").remedy
    assert remedy is not None
    assert "about 260 more KV tokens (1 more pod like these)" in remedy


def test_a_prompt_that_the_fleet_had_room_for_was_dropped_by_its_pod() -> None:
    ladder = run(lambda clock: ended(clock, BLOCKS[:4]), lambda clock: ended(clock, BLOCKS[:4]))
    assert losses(ladder)["dropped"] == 64
    assert rung(ladder, "capacity").tokens == 64
    assert rung(ladder, "perfect").tokens == 0


def test_a_pod_that_was_emptied_since_is_the_cause() -> None:
    clock = Clock()
    log = LadderLog(clock)
    log.ended(ended(clock, BLOCKS[:4]))
    clock.now += 5
    log.emptied("pod-0")
    clock.now += 5
    log.ended(ended(clock, BLOCKS[:4]))
    assert losses(log.since(60))["emptied"] == 64


def test_without_the_size_of_the_caches_the_rung_is_unknown() -> None:
    ladder = run(
        lambda clock: ended(clock, BLOCKS[:4], capacity=None), lambda clock: ended(clock, BLOCKS[:4], capacity=None)
    )
    assert rung(ladder, "capacity").tokens is None
    assert rung(ladder, "capacity").share is None
    assert losses(ladder)["capacity_unknown"] == 64
    assert rung(ladder, "ideal").tokens == 64
    assert rung(ladder, "perfect").tokens == 0


def test_what_another_pod_held_is_lost_to_the_reason_for_not_choosing_it() -> None:
    ladder = run(
        lambda clock: ended(clock, BLOCKS[:4]),
        lambda clock: ended(clock, BLOCKS[:4], best=64, predicted=16, why_other="filtered:bounded-load"),
    )
    assert losses(ladder)["filtered:bounded-load"] == 48
    assert "the filter `bounded-load` had removed" in loss(ladder, "filtered:bounded-load").cause
    assert rung(ladder, "perfect").tokens == 64
    assert rung(ladder, "predicted").tokens == 16


def test_reported_hits_are_compared_only_where_they_are_reported() -> None:
    ladder = run(
        lambda clock: ended(clock, BLOCKS[:4], best=64, predicted=64, reported=32),
        lambda clock: ended(clock, BLOCKS[:4], best=64, predicted=64),
    )
    reported = rung(ladder, "reported")
    assert (reported.tokens, reported.of_tokens, ladder.reported_requests) == (32, 65, 1)
    assert losses(ladder)["fewer"] == 32
    assert loss(ladder, "fewer").share == round(32 / 65, 4)


def test_replies_that_events_report_were_seen_before() -> None:
    clock = Clock()
    log = LadderLog(clock)
    log.ended(ended(clock, BLOCKS[:4]))
    log.stored("m", "pod-0", BLOCKS[4:6])
    log.stored("never asked for", "pod-0", BLOCKS[6:8])
    clock.now += 5
    log.ended(ended(clock, BLOCKS[:8]))
    assert rung(log.since(60), "ideal").tokens == 6 * SIZE


def test_tokens_without_ids_and_beyond_the_limit_are_named() -> None:
    ladder = run(
        lambda clock: ended(clock, BLOCKS[:4], prompt_tokens=10 * SIZE + 1),
        lambda clock: ended(clock, [], prompt_tokens=0, unknown_tokens=100),
        lambda clock: ended(clock, BLOCKS[:4], bypasses=True),
    )
    assert losses(ladder) == {"not_looked_up": 96, "new": 64, "ends": 1, "ids_unknown": 100, "caches_bypassed": 65}


def test_only_the_last_minutes_count_and_counters_get_what_is_over() -> None:
    clock = Clock()
    log = LadderLog(clock, kept_seconds=10 * PERIOD_SECONDS)
    log.ended(ended(clock, BLOCKS[:4]))
    assert not log.counters()
    clock.now += 5 * PERIOD_SECONDS
    log.ended(ended(clock, BLOCKS[:2]))
    assert log.since(60).prompt_tokens == 33
    assert log.since(3_600).prompt_tokens == 98
    assert log.counters()["prompt"] == 65
    assert log.counters()["lost:new"] == 64
    clock.now += 20 * PERIOD_SECONDS
    assert log.counters()["prompt"] == 98
    assert log.since(10**6).prompt_tokens == 0


def test_models_beyond_the_bound_are_not_sampled_and_gone_ones_make_room() -> None:
    clock = Clock()
    log = LadderLog(clock)
    for number in range(20):
        log.ended(ended(clock, BLOCKS[:4], model=f"m{number}", base_model=f"m{number}"))
    assert losses(log.since(60)) == {"new": 16 * 64, "unsampled": 4 * 64, "ends": 20}
    assert len(log) == 16 * 4
    log.keep_models(["m1"])
    assert len(log) == 4


@given(st.integers(0, 2**32), st.sampled_from([24, 100, 100_000]), st.sampled_from([None, 500, 3_000]))
def test_the_rungs_never_rise(seed: int, most_blocks: int, capacity: int | None) -> None:
    rng = random.Random(seed)
    clock = Clock()
    log = LadderLog(clock, most_blocks=most_blocks)
    content = [[rng.randrange(ALL) for _ in range(12)] for _ in range(6)]
    for _ in range(rng.randint(1, 60)):
        clock.now += rng.choice((0.1, 30.0))
        blocks = rng.choice(content)[: rng.randint(0, 12)]
        known = len(blocks) * SIZE + rng.randint(0, SIZE)
        blocks = blocks[: rng.choice((2, 12))]
        best = rng.randint(0, max(0, min(known - 1, (len(blocks) + 1) * SIZE)))
        predicted = rng.randint(0, best)
        reported = rng.choice((None, rng.randint(0, known + 20)))
        log.ended(
            ended(
                clock,
                blocks,
                prompt_tokens=known,
                best=best,
                predicted=predicted,
                reported=reported,
                capacity=capacity,
                unknown_tokens=rng.choice((0, 7)),
            )
        )
    ladder = log.since(10**6)
    values = [ladder.prompt_tokens, *(each.tokens for each in ladder.rungs[:4] if each.tokens is not None)]
    assert all(lower <= upper for upper, lower in pairwise(values))
    assert all(each.tokens is None or 0 <= each.tokens <= each.of_tokens for each in ladder.rungs)
    clock.now += PERIOD_SECONDS + 1.0
    exact = log.counters()
    assert all(tokens >= 0 for tokens in exact.values())
    gone = sum(tokens for name, tokens in exact.items() if name.startswith("lost:") and name != "lost:fewer")
    assert gone + exact["predicted"] == pytest.approx(ladder.prompt_tokens)
    assert len(log) <= most_blocks


@pytest.mark.parametrize("seed", range(3))
def test_the_sampled_ladder_is_within_its_stated_error_of_the_exact_one(seed: int) -> None:
    rng = random.Random(seed)
    clock = Clock()
    exact, sampled = LadderLog(clock, most_blocks=200_000), LadderLog(clock, most_blocks=1_024)
    content: dict[tuple[int, int], int] = {}
    for _ in range(3_000):
        clock.now += 0.5
        session = int(rng.paretovariate(0.6)) % 2_000
        blocks = [content.setdefault((session, at), rng.randrange(ALL)) for at in range(rng.randint(5, 40))]
        request = ended(clock, blocks, capacity=6_000 * SIZE, best=rng.choice((0, 3 * SIZE)))
        request = replace(request, predicted=request.best)
        exact.ended(request)
        sampled.ended(request)
    true, estimated = exact.since(10**6), sampled.since(10**6)
    assert true.error_share == 0.0
    assert estimated.sampled_share < 0.2
    assert estimated.error_share is not None
    assert 0 < estimated.error_share < 0.1
    for name in ("ideal", "capacity"):
        one, other = rung(true, name).share, rung(estimated, name).share
        assert one is not None
        assert other is not None
        assert abs(one - other) <= estimated.error_share


def test_a_pod_of_the_same_name_that_comes_back_is_told_from_the_one_that_left() -> None:
    clock = Clock()
    log = LadderLog(clock)
    watched = WatchedIndex(MemoryIndex(), log)
    log.ended(ended(clock, BLOCKS[:4]))
    clock.now += 5
    watched.forget("pod-0")
    for number in range(5_000):
        watched.clear(f"other-{number % 50}")
        watched.forget(f"other-{number % 50}")
        watched.clear("pod-0~host")
    clock.now += 5
    log.ended(ended(clock, BLOCKS[:4]))
    assert losses(log.since(60))["emptied"] == 64


def test_hashes_that_do_not_name_a_prefix_prove_nothing() -> None:
    clock = Clock()
    log = LadderLog(clock, tracks=False)
    for _ in range(2):
        log.ended(ended(clock, BLOCKS[:4]))
    assert losses(log.since(60)) == {"unsampled": 128, "ends": 2}


def test_every_cause_is_explained() -> None:
    docs = Path(__file__).parents[4] / "docs"
    pages = (docs / "troubleshooting.md").read_text() + (docs / "replay.md").read_text()
    assert [cause.name for cause in CAUSES if f"`{cause.name}`" not in pages] == []


def test_counters_never_fall_and_add_up() -> None:
    clock = Clock()
    log = LadderLog(clock, most_blocks=40)
    registry = CollectorRegistry()
    registry.register(LadderCollector(log))
    rng, before = random.Random(3), dict[str, float]()
    for _ in range(200):
        clock.now += 7.0
        blocks = BLOCKS[: rng.randint(0, 60)]
        log.ended(ended(clock, blocks, capacity=600, reported=rng.choice((None, 0))))
        now = dict(log.counters())
        assert all(now[name] >= tokens for name, tokens in before.items())
        before = now

    def sample(name: str, **labels: str) -> float:
        return registry.get_sample_value(f"matrixinfer_ladder_{name}_total", labels) or 0.0

    rungs = [sample("tokens", rung=name) for name in ("prompt", "ideal", "capacity", "perfect", "predicted")]
    assert rungs == sorted(rungs, reverse=True)
    causes = [cause.name for cause in CAUSES if cause.rung != "reported"]
    assert rungs[0] - rungs[-1] == pytest.approx(sum(sample("lost_tokens", cause=name) for name in causes))
    assert sample("reported_tokens", kind="prompt") > 0
