"""What is counted of the last hour."""

from __future__ import annotations

import random

import pytest

from matrixinfer.dashboard.history import BUCKET_SECONDS, BUCKETS, OTHERS, History
from matrixinfer.dashboard.sums import Sums
from matrixinfer.routing.decision_log import Record, record
from matrixinfer.scheduler.framework import Candidate, Condition, Decision, SchedulingRequest


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def decided(
    history: History, *, model: str = "m", tokens: int | None = 1_000, matched: int = 6, pods: int = 2
) -> Record:
    candidates = [
        Candidate(
            name=f"p{at}",
            url="",
            matched_blocks=matched if at == 0 else 0,
            trust="exact",
            engine_block=100,
            condition=Condition(prefill_rate=500.0),
        )
        for at in range(pods)
    ]
    request = SchedulingRequest(id="r", model=model, prompt_tokens=tokens, block_size=100, chain=range(10), prefix=b"")
    decision = Decision(
        request=request, candidates=candidates, ranked=candidates, filtered={}, scores={}, totals={}, timings_ms={}
    )
    made = record(decision, "/v1/completions", [], {})
    history.decided(made, decision)
    return made


def answered(
    history: History, made: Record, *, cached: int | None = 600, status: int = 200, seconds: float = 0.1
) -> None:
    made.answered(status)
    made.first_byte(seconds)
    made.usage(1_000, cached)
    history.ended(made)


def test_tokens_seconds_and_rates_of_answers_are_summed() -> None:
    history = History(Clock())
    answered(history, decided(history))
    answered(history, decided(history), cached=400)
    total = history.total()
    assert (total.requests, total.errors) == (2, 0)
    assert (total.predicted_tokens, total.predicted_of) == (1_200, 2_000)
    assert (total.reported_tokens, total.reported_of) == (1_000, 2_000)
    assert total.saved_seconds == pytest.approx(1_000 / 500.0)
    assert history.endpoint("p0").cached_tokens == 1_000
    assert history.endpoint("p1").requests == 0
    history.forget("p0")
    assert history.endpoint("p0").requests == 0
    assert history.total().requests == 2


def test_an_engine_that_reports_nothing_is_not_one_that_found_nothing() -> None:
    history = History(Clock())
    answered(history, decided(history), cached=None)
    assert (history.total().reported_of, history.total().silent_tokens) == (0, 1_000)
    answered(history, decided(history), cached=600)
    answered(history, decided(history), cached=None)  # it reports hits, so no number is no hit
    assert (history.total().reported_of, history.total().reported_tokens) == (2_000, 600)
    assert history.total().silent_tokens == 1_000
    history.forget("p0")  # another engine may come under its name
    answered(history, decided(history), cached=None)
    assert history.total().silent_tokens == 2_000


def test_requests_without_an_answer_and_server_errors_are_errors() -> None:
    history = History(Clock())
    history.ended(decided(history))
    for status in (200, 400, 499, 500, 503):
        answered(history, decided(history), status=status)
    assert (history.total().requests, history.total().errors) == (6, 3)


def test_nothing_was_predicted_for_a_pod_that_was_not_chosen() -> None:
    history = History(Clock())
    made = decided(history)
    made.moved("p1")
    answered(history, made)
    assert (history.total().predicted_of, history.endpoint("p1").requests) == (0, 1)


def test_a_prompt_without_token_ids_predicts_nothing() -> None:
    history = History(Clock())
    answered(history, decided(history, tokens=None))
    assert (history.total().predicted_of, history.total().round_robin_of) == (0, 0)


def test_what_is_older_than_an_hour_is_gone() -> None:
    clock = Clock()
    history = History(clock)
    answered(history, decided(history))
    clock.now += BUCKET_SECONDS * (BUCKETS - 1)
    assert history.total().requests == 1
    answered(history, decided(history))
    clock.now += BUCKET_SECONDS
    assert history.total().requests == 1
    clock.now += BUCKET_SECONDS * BUCKETS
    assert (history.total().requests, history.total().saved_seconds, history.hour.endpoints) == (0, 0.0, {})


def test_sums_over_the_hour_are_those_of_its_buckets() -> None:
    clock, draw = Clock(), random.Random(1)
    history = History(clock)
    for _ in range(3_000):
        clock.now += draw.expovariate(1 / 4.0)
        answered(history, decided(history), cached=draw.choice([None, 0, 600]), seconds=draw.random())
    total = Sums()
    for _, sums in history.buckets:
        total.add(sums)
    points = history.points()
    assert sum(point.requests for point in points) == history.total().requests == total.requests
    assert total.ttft == history.hour.ttft
    assert total.endpoints == history.hour.endpoints
    assert len(history.buckets) <= BUCKETS


def test_models_beyond_a_bound_are_counted_together() -> None:
    history = History(Clock())
    for number in range(100):
        answered(history, decided(history, model=f"m{number}"))
    assert sum(history.hour.models.values()) == 100
    assert len(history.hour.models) == 65
    assert history.hour.models[OTHERS] == 36


@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_percentiles_are_right_within_a_tenth(spread: float) -> None:
    draw, sums = random.Random(2), Sums()
    times = sorted(200.0 * draw.lognormvariate(0, spread) for _ in range(2_000))
    for each in times:
        sums.first_byte(each)
    for share in (0.5, 0.9):
        assert sums.percentile(share) == pytest.approx(times[int(share * len(times))], rel=0.1)
    assert Sums().percentile(0.5) is None
