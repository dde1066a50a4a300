"""What each built-in plugin returns."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.config import Section, convert
from matrixinfer.scheduler.framework import Candidate, Decision, Filter, PostSchedule, SchedulingRequest, Scorer, Scores
from matrixinfer.scheduler.plugins import BUILT_IN
from matrixinfer.scheduler.plugins.bounded_load import bound
from matrixinfer.scheduler.plugins.least_request import spread

from .support import pod, pods, profile, request, scheduler, services

Loads = st.lists(st.integers(0, 500), min_size=1, max_size=20)


def make(name: str, **args: Any) -> Any:
    plugin = BUILT_IN[name]
    return plugin(convert(args, plugin.Args, path="$"), services())


def score(name: str, candidates: Sequence[Candidate], asked: SchedulingRequest | None = None, **args: Any) -> Scores:
    plugin = make(name, **args)
    assert isinstance(plugin, Scorer)
    return plugin.score(asked or request(), candidates)


def removed(name: str, candidates: Sequence[Candidate], **args: Any) -> list[str]:
    plugin = make(name, **args)
    assert isinstance(plugin, Filter)
    reasons = plugin.filter(request(), candidates)
    return [c.name for c, reason in zip(candidates, reasons, strict=True) if reason is not None]


def send(plugin: PostSchedule, asked: SchedulingRequest, candidates: Sequence[Candidate], chosen: Candidate) -> None:
    plugin.post_schedule(
        asked,
        Decision(
            request=asked, candidates=candidates, ranked=[chosen], filtered={}, scores={}, totals={}, timings_ms={}
        ),
    )


class TestKvCacheAware:
    def test_scores_the_share_of_matched_and_pending_blocks(self) -> None:
        candidates = [
            pod("none", matched_blocks=0),
            pod("half", matched_blocks=2),
            pod("pending", matched_blocks=1, pending_blocks=2),
            pod("all", matched_blocks=4, pending_blocks=3),
        ]
        assert score("kvcache-aware", candidates) == Scores(values=[0.0, 50.0, 75.0, 100.0])

    @pytest.mark.parametrize(("limit", "values"), [(0, [25.0, 75.0]), (1, [100.0, 100.0]), (2, [50.0, 100.0])])
    def test_considers_at_most_the_blocks_asked_for(self, limit: int, values: list[float]) -> None:
        candidates = [pod("a", matched_blocks=1), pod("b", matched_blocks=3)]
        assert score("kvcache-aware", candidates, maxBlocksToMatch=limit).values == values

    def test_reads_no_hash(self) -> None:
        class Lazy(Sequence[int]):
            def __len__(self) -> int:
                return 4

            def __getitem__(self, index: Any) -> Any:
                raise AssertionError("read")

        assert score("kvcache-aware", [pod("a", matched_blocks=4)], request(chain=Lazy())).values == [100.0]

    def test_counts_only_pending_blocks_where_the_index_could_not_say(self) -> None:
        answer = score("kvcache-aware", [pod("a", pending_blocks=1), pod("b", matched_blocks=4)])
        assert answer == Scores(values=[25.0, 100.0], note="the index could not say what 1 of 2 pods hold")

    @pytest.mark.parametrize(("tokens", "size", "says"), [(64, 64, True), (64, None, False), (65, 64, False)])
    def test_says_that_a_prompt_within_one_block_of_every_engine_has_no_hit(
        self, tokens: int, size: int | None, says: bool
    ) -> None:
        candidates = [pod("a", engine_block=128, matched_blocks=4), pod("b", engine_block=size, matched_blocks=4)]
        answer = score("kvcache-aware", candidates, request(prompt_tokens=tokens))
        assert (answer.values == [0.0, 0.0]) == says
        assert ("64 tokens in its cache: they fit into one block" in (answer.note or "")) == says

    @pytest.mark.parametrize(
        ("tokens", "words"),
        [(None, "not tokenized"), (9, "9 tokens are fewer than one block of 10"), (50, "no block that an index")],
    )
    def test_says_why_a_prompt_has_no_block(self, tokens: int | None, words: str) -> None:
        answer = score("kvcache-aware", [pod("a", matched_blocks=None)], request(prompt_tokens=tokens, chain=()))
        assert answer.values == [0.0]
        assert words in (answer.note or "")


class TestLeastRequest:
    def test_removes_pods_whose_fresh_queue_reaches_the_limit(self) -> None:
        candidates = [
            pod("short", waiting=9, metrics_age=1.0),
            pod("long", waiting=10, metrics_age=1.0),
            pod("unknown", in_flight=50),
            pod("old", waiting=10),
        ]
        assert removed("least-request", candidates) == ["long"]
        assert removed("least-request", candidates, maxWaitingRequests=9) == ["short", "long"]

    def test_scores_by_the_load_that_is_known(self) -> None:
        candidates = [pod("a"), pod("b", in_flight=4), pod("c", running=3, waiting=1)]
        assert score("least-request", candidates).values == [100.0, 50.0, 50.0]

    @given(Loads)
    def test_spread_is_100_for_the_least_and_falls_with_load(self, loads: list[int]) -> None:
        scores = spread(loads)
        assert all(0.0 < value <= 100.0 for value in scores)
        for load, value in zip(loads, scores, strict=True):
            assert (value == 100.0) == (load == min(loads))
            assert all(value > below for above, below in zip(loads, scores, strict=True) if above > load)

    def test_one_request_more_does_not_outweigh_a_warm_cache_on_an_idle_fleet(self) -> None:
        assert spread([1, 0, 0, 0]) == [80.0, 100.0, 100.0, 100.0]

    def test_one_overloaded_pod_does_not_make_the_others_alike(self) -> None:
        scores = spread([100, 8, 0, 0])
        assert scores[2] - scores[1] > 20.0


class TestGpuCacheUsage:
    def test_scores_the_free_share(self) -> None:
        candidates = [pod("a", cache_usage=0.0), pod("b", cache_usage=0.75), pod("c", cache_usage=1.0)]
        assert score("gpu-cache-usage", candidates) == Scores(values=[100.0, 25.0, 0.0])

    def test_gives_the_unknown_the_mean_of_the_known(self) -> None:
        candidates = [pod("a", cache_usage=0.2), pod("b"), pod("c", cache_usage=0.6)]
        answer = score("gpu-cache-usage", candidates)
        assert answer.values == pytest.approx([80.0, 60.0, 40.0])
        assert answer.note == "cache use is unknown for 1 of 3 pods"

    def test_gives_50_where_nothing_is_known(self) -> None:
        assert score("gpu-cache-usage", pods(2)).values == [50.0, 50.0]

    def test_keeps_values_outside_of_the_scale_inside(self) -> None:
        candidates = [pod("a", cache_usage=1.0000001), pod("b", cache_usage=-0.1)]
        assert score("gpu-cache-usage", candidates).values == [0.0, 100.0]


class TestBoundedLoad:
    def test_lets_an_idle_fleet_keep_up_to_the_floor_together(self) -> None:
        assert removed("bounded-load", [pod("a", in_flight=3), *pods(7)]) == []
        assert removed("bounded-load", [pod("a", in_flight=4), *pods(7)]) == ["a"]

    def test_bounds_a_busy_pod_by_its_fair_share(self) -> None:
        # 79 in flight and this one on 8 pods: 1.25 × 80 / 8 = 12.5, so 13.
        candidates = [pod("a", in_flight=13), pod("b", in_flight=12), *pods(6, in_flight=9)]
        assert removed("bounded-load", candidates) == ["a"]

    def test_takes_the_factor_as_written(self) -> None:
        # 1.1 × 10 / 11 is 1; as a float it is a little more, which would round up to 2.
        candidates = [*pods(9, in_flight=1), pod("x"), pod("y")]
        assert removed("bounded-load", candidates, factor=1.1, minInFlight=1) == [c.name for c in candidates[:9]]

    @given(Loads, st.fractions(1, 3, max_denominator=100), st.integers(1, 5))
    def test_the_bound_is_the_formula_and_spares_the_least_loaded(
        self, loads: list[int], factor: Fraction, floor: int
    ) -> None:
        limit = bound(sum(loads), len(loads), factor=factor, min_in_flight=floor)
        assert limit == max(floor, ceil(factor * (sum(loads) + 1) / len(loads)))
        assert min(loads) + 1 <= limit


class TestRoundRobin:
    def test_takes_pods_in_turn_by_name_and_per_model(self) -> None:
        plugin = make("round-robin")
        candidates = [pod("c"), pod("a"), pod("b")]
        taken = []
        for _ in range(4):
            values = plugin.score(request(), candidates).values
            chosen = candidates[values.index(100.0)]
            send(plugin, request(), candidates, chosen)
            taken.append(chosen.name)
        assert taken == ["a", "b", "c", "a"]
        assert plugin.score(request(model="other"), candidates).values == pytest.approx([100 / 3, 100.0, 200 / 3])

    def test_goes_on_by_name_when_pods_come_and_go(self) -> None:
        plugin = make("round-robin")
        send(plugin, request(), [pod("b")], pod("b"))
        assert plugin.score(request(), [pod("a"), pod("bb"), pod("c")]).values[1] == 100.0
        assert plugin.score(request(), [pod("a"), pod("aa")]).values[0] == 100.0

    def test_remembers_the_turn_of_the_models_used_last(self) -> None:
        plugin = make("round-robin")
        candidates = [pod("a"), pod("b")]
        for model in (*map(str, range(1024)), "0", "one more"):
            send(plugin, request(model=model), candidates, candidates[0])

        def turn(model: str) -> str:
            values: Sequence[float] = plugin.score(request(model=model), candidates).values
            return candidates[values.index(100.0)].name

        assert [turn(model) for model in ("0", "2", "one more")] == ["b", "b", "b"]
        assert turn("1") == "a"


def test_random_draws_are_uniform_and_seeded() -> None:
    values = score("random", pods(4000)).values
    assert values == score("random", pods(4000)).values
    assert 48.0 < sum(values) / len(values) < 52.0
    assert min(values) < 1.0
    assert max(values) > 99.0


class TestPrefixCache:
    def test_scores_the_share_of_the_chunks_that_were_sent_to_a_pod(self) -> None:
        candidates = [pod("a", recent_chunks=3), pod("b", recent_chunks=1), pod("c")]
        answer = score("prefix-cache", candidates, request(chunks=(1, 2, 3, 4), chunk_ends=(1, 2, 3, 4)))
        assert answer == Scores(values=[75.0, 25.0, 0.0])

    def test_says_that_a_prompt_is_too_short(self) -> None:
        answer = score("prefix-cache", pods(1), request(prefix=b"abc"))
        assert answer == Scores(values=[0.0], note="the prompt's 3 bytes are fewer than one chunk")

    def test_asks_for_the_bytes_of_every_prompt(self) -> None:
        assert scheduler(profile(scorers=("prefix-cache",))).reads_bytes
        assert not scheduler(profile(scorers=("kvcache-aware",))).reads_bytes


class TestExpectedTtft:
    """Prompts of 4,000 tokens at 8,000 tokens per second: half a second, and 4 % more for attention."""

    ASKED = request(prompt_tokens=4_000, block_size=100, chain=tuple(range(40)))
    RATE: ClassVar[dict[str, Any]] = {"prefill_rate": 8_000.0, "queue_seconds": 0.0}

    def expected(self, *candidates: Candidate, **args: Any) -> list[float]:
        times = score("expected-ttft", candidates, self.ASKED, **args).expected_ms
        assert times is not None
        return list(times)

    def test_adds_up_queue_and_what_is_not_cached_at_the_rate_of_each_pod(self) -> None:
        times = self.expected(
            pod("cold", **self.RATE),
            pod("warm", matched_blocks=30, **self.RATE),
            pod("pending", matched_blocks=10, pending_blocks=20, **self.RATE),
            pod("slow", prefill_rate=1_000.0, queue_seconds=0.0),
            pod("busy", prefill_rate=8_000.0, queue_seconds=2.0),
            pod("unknown", queued_tokens=800),
        )
        assert times == pytest.approx([520.0, 133.75, 133.75, 4_160.0, 2_520.0, 620.0])

    def test_each_request_in_flight_costs_some_tokens_and_is_delayed_itself(self) -> None:
        pods = [pod("a", in_flight=10, **self.RATE), pod("idle", **self.RATE)]
        times = self.expected(*pods, requestTokens=80, stallShare=0.1)
        assert times == pytest.approx([520.0 + 10 * 10.0 + (10 + 5) * 0.1 * 520.0, 520.0 + 5 * 0.1 * 520.0])

    def test_requests_in_flight_make_a_queue_count_for_more(self) -> None:
        queues = [pod("a", in_flight=n, prefill_rate=8_000.0, queue_seconds=0.2) for n in (0, 1, 4, 4)]
        times = self.expected(*queues, requestTokens=0, stallShare=0, waitShare=0.5)
        assert times == pytest.approx([720.0, 820.0, 1_120.0, 1_120.0])

    def test_with_two_pods_the_queue_counts_for_half_as_much_more(self) -> None:
        queues = [pod("a", in_flight=n, prefill_rate=8_000.0, queue_seconds=0.2) for n in (0, 4)]
        times = self.expected(*queues, requestTokens=0, stallShare=0, waitShare=0.5)
        assert times == pytest.approx([720.0, 920.0])

    def test_the_end_of_a_long_prompt_costs_more_than_its_start(self) -> None:
        asked = request(prompt_tokens=100_000, block_size=100, chain=tuple(range(1_000)))
        pods = [pod("cold", **self.RATE), pod("half", matched_blocks=500, **self.RATE)]
        cold, half = score("expected-ttft", pods, asked).expected_ms or ()
        assert (cold, half) == pytest.approx((2 * 12_500.0, 2.5 * 6_250.0))

    def test_requests_of_others_that_wait_are_a_queue(self) -> None:
        one = self.expected(pod("a", foreign=5, running=1, waiting=4, metrics_age=0.1, **self.RATE), stallShare=0)
        assert one == pytest.approx([520.0 + (5 + 4) * 16.0])

    def test_a_full_cache_costs_what_is_pushed_out_and_needed_again(self) -> None:
        full = {"held_tokens": 100_000, "cache_tokens": 100_000, **self.RATE}
        times = self.expected(
            pod("room", held_tokens=90_000, cache_tokens=100_000, **self.RATE),
            pod("half", held_tokens=98_000, cache_tokens=100_000, evicted_per_second=1e9, **self.RATE),
            pod("idle", **full),
            pod("turning-over", evicted_per_second=100_000 / 60, **full),
            pod("thrashing", evicted_per_second=1e9, **full),
            pod("unknown", held_tokens=100_000, **self.RATE),
        )
        assert times == pytest.approx([520.9, 770.98, 671.0, 771.0, 1_021.0, 520.0], abs=0.1)

    def test_equal_pods_are_told_apart_by_their_footprint(self) -> None:
        pods = [pod(str(n), held_tokens=n, cache_tokens=100_000, **self.RATE) for n in (30_000, 10_000, 20_000)]
        values = score("expected-ttft", pods, self.ASKED).values
        assert values.index(max(values)) == 1

    def test_scores_keep_differences_in_milliseconds_and_never_end(self) -> None:
        waits = [0.0, 0.001, 5.0, 10.0, 20.0, 1_000.0]
        values = score(
            "expected-ttft", [pod(f"{wait}", prefill_rate=8_000.0, queue_seconds=wait) for wait in waits], self.ASKED
        ).values
        assert values == pytest.approx([100.0, 99.995, 75.0, 50.0, 25.0, 0.5])

    def test_an_answer_with_a_time_that_is_no_number_is_refused(self) -> None:
        class Endless:
            name: ClassVar[str] = "endless"
            Args: ClassVar[type[Section]] = BUILT_IN["random"].Args

            def __init__(self, args: Section, services: object) -> None: ...

            def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
                return Scores(values=[1.0] * len(candidates), expected_ms=[float("nan")] * len(candidates))

        made = scheduler(profile(scorers=["endless"]), Endless)
        decision = made.schedule(request(), pods(2))
        assert (made.rejected["endless"], decision.expected_ms) == (1, {})


class TestSessionAffinity:
    def after(self, *, chosen: str = "pod-1", at: float = 0.0, **args: Any) -> Any:
        plugin = make("session-affinity", **args)
        candidates = pods(3)
        asked = request(session="s", now=at)
        send(plugin, asked, candidates, next(each for each in candidates if each.name == chosen))
        return plugin

    def test_prefers_the_pod_of_the_last_request_of_a_session(self) -> None:
        plugin = self.after()
        assert plugin.score(request(session="s"), pods(3)).values == [0.0, 100.0, 0.0]
        for other in (request(), request(session="t"), request(session="s", model="other")):
            assert plugin.score(other, pods(3)).values == [0.0] * 3
        assert plugin.score(request(session="s"), [pod("new")]).values == [0.0]

    def test_ends_with_time(self) -> None:
        plugin = self.after(ttlSeconds=60)
        assert plugin.score(request(session="s", now=59.0), pods(3)).values[1] == 100.0
        assert plugin.score(request(session="s", now=60.0), pods(3)).values[1] == 0.0

    def test_does_not_count_at_an_overloaded_pod(self) -> None:
        plugin = self.after(maxLoad=2)
        loads = [pod("pod-0", in_flight=2), pod("pod-1", in_flight=8), pod("pod-2", in_flight=2)]
        assert plugin.score(request(session="s"), loads).values[1] == 100.0  # a few requests are no overload
        loads[1] = pod("pod-1", in_flight=30)
        answer = plugin.score(request(session="s"), loads)
        assert (answer.values[1], answer.note) == (0.0, "the session's pod pod-1 has 30 requests, the limit is 22.7")

    def test_keeps_the_sessions_used_last_and_none_that_have_ended(self) -> None:
        plugin = make("session-affinity", maxSessions=2, ttlSeconds=60)
        candidates = pods(2)
        for name, now in (("a", 0.0), ("b", 1.0), ("a", 2.0), ("c", 3.0)):
            send(plugin, request(session=name, now=now), candidates, candidates[0])
        scores = [plugin.score(request(session=name, now=3.0), candidates).values[0] for name in "abc"]
        assert scores == [100.0, 0.0, 100.0]
        send(plugin, request(session="d", now=100.0), candidates, candidates[0])
        assert [plugin.score(request(session=name, now=3.0), candidates).values[0] for name in "acd"] == [
            0.0,
            0.0,
            100.0,
        ]


class TestLoad:
    """`Candidate.load`."""

    def test_what_has_ended_since_the_engine_was_read_does_not_count(self) -> None:
        assert pod("a", in_flight=1, foreign=0, running=5, waiting=3).load == 1
        assert pod("a", in_flight=1, foreign=3, running=5, waiting=3).load == 4
        assert pod("a", in_flight=1, running=5, waiting=3).load == 8  # nobody has told them apart

    def test_no_more_requests_wait_than_are_there(self) -> None:
        assert removed("least-request", [pod("a", in_flight=2, foreign=1, waiting=30, metrics_age=0.9)]) == []
        assert removed("least-request", [pod("a", in_flight=2, foreign=9, waiting=30, metrics_age=0.9)]) == ["a"]
        assert removed("least-request", [pod("a", in_flight=2, waiting=30, metrics_age=0.9)]) == ["a"]
