"""What single policies choose, where the right choice is plain."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from matrixinfer.scheduler.framework import Candidate, SchedulingRequest
from matrixinfer.scheduler.policies import POLICIES as PROFILES
from matrixinfer.study.baselines import (
    Approximate,
    ApproxPrefix,
    Baseline,
    LeastRequest,
    LongestMatch,
    PowerOfTwo,
    PrefixHash,
    RoundRobin,
    SessionHash,
    SessionSticky,
)
from matrixinfer.study.jobs import Job
from matrixinfer.study.policies import POLICIES, chosen
from matrixinfer.study.presets import presets
from matrixinfer.study.rivals import AibrixPrefixCache, SglangCacheAware, dynamo_kv, lmetric

PODS = ("a", "b", "c")


def made(kind: type[Baseline], pod_tokens: int = 10_000) -> Baseline:
    policy = kind(seed=0, block_size=16, pod_tokens=pod_tokens)
    for pod in PODS:
        policy.join(pod)
    return policy


def job(session: str = "s", prompt: int = 160, keys: Sequence[int] | None = None) -> Job:
    hashes = list(range(1, prompt // 16 + 1)) if keys is None else list(keys)
    return Job(0, session, prompt, 10, hashes, 0.0)


def test_round_robin_takes_turns_and_least_request_the_fewest() -> None:
    policy = made(RoundRobin)
    assert [policy.route(job()) for _ in range(4)] == ["a", "b", "c", "a"]
    least = made(LeastRequest)
    first = [job() for _ in range(3)]
    assert {least.route(each) for each in first} == set(PODS)
    least.ended(first[1])
    assert least.route(job()) == first[1].pod


def test_power_of_two_never_takes_the_fullest() -> None:
    policy = made(PowerOfTwo)
    policy.in_flight |= {"a": 9, "b": 2, "c": 1}
    assert "a" not in {policy.choose(job(), PODS) for _ in range(50)}


@pytest.mark.parametrize("kind", [SessionHash, PrefixHash])
def test_hashes_keep_their_pod_and_move_only_what_was_at_one_that_left(kind: type[Baseline]) -> None:
    policy = made(kind)
    jobs = [job(f"s{n}", keys=range(n * 10, n * 10 + 10)) for n in range(60)]
    before = [policy.choose(each, PODS) for each in jobs]
    assert set(before) == set(PODS)
    assert [policy.choose(each, PODS) for each in jobs] == before
    after = [policy.choose(each, ("a", "b")) for each in jobs]
    assert all(new == old for new, old in zip(after, before, strict=True) if old != "c")


def test_a_sticky_session_stays_until_its_pod_has_more_than_twice_the_mean() -> None:
    policy = made(SessionSticky)
    home = policy.route(job("s"))
    other = next(pod for pod in PODS if pod != home)
    policy.ongoing[other] = 160
    policy.ongoing[home] = 320
    assert policy.choose(job("s"), PODS) == home
    policy.ongoing[home] = 900
    assert policy.choose(job("s"), PODS) != home


def test_what_was_sent_is_remembered_as_far_as_a_cache_reaches() -> None:
    policy = made(LongestMatch, pod_tokens=160)
    assert isinstance(policy, Approximate)
    first = job(keys=range(10))
    home = policy.route(first)
    assert policy.matched(first, home) == 144  # the last token is always computed
    policy.ended(first)
    second = job(prompt=80, keys=range(100, 105))
    second.pod = home
    policy.sent(second)
    assert policy.matched(first, home) == 80
    policy.down(home)
    policy.up(home)
    assert policy.matched(first, home) == 0


@pytest.mark.parametrize("kind", [LongestMatch, ApproxPrefix, SglangCacheAware, AibrixPrefixCache])
def test_a_prompt_that_was_sent_before_goes_there_again(kind: type[Baseline]) -> None:
    policy = made(kind)
    first = job()
    home = policy.route(first)
    policy.ended(first)
    assert {policy.choose(job(), PODS) for _ in range(20)} == {home}


@pytest.mark.parametrize(("kind", "most"), [(SglangCacheAware, 65), (AibrixPrefixCache, 9)])
def test_out_of_balance_the_fewest_requests_decide(kind: type[Baseline], most: int) -> None:
    policy = made(kind)
    first = job()
    home = policy.route(first)
    policy.in_flight[home] = most - 1
    assert policy.choose(job(), PODS) == home
    policy.in_flight[home] = most
    assert policy.choose(job(), PODS) != home


def candidate(name: str, *, matched: int = 0, in_flight: int = 0) -> Candidate:
    return Candidate(name=name, url="", trust="exact", engine_block=16, matched_blocks=matched, in_flight=in_flight)


REQUEST = SchedulingRequest(id="", model="m", prompt_tokens=160, block_size=16, chain=range(10), prefix=b"")


def test_lmetric_multiplies_new_tokens_by_the_batch() -> None:
    cold = candidate("b", in_flight=1)
    assert lmetric(REQUEST, [candidate("a", matched=4, in_flight=3), cold], {}).name == "b"  # 96 × 4 > 160 × 2
    assert lmetric(REQUEST, [candidate("a", matched=6, in_flight=3), cold], {}).name == "a"  # 64 × 4 < 160 × 2


def test_dynamo_adds_prefill_and_active_blocks() -> None:
    pods = [candidate("a", matched=5), candidate("b")]
    assert dynamo_kv(REQUEST, pods, {"a": 79}).name == "a"
    assert dynamo_kv(REQUEST, pods, {"a": 81}).name == "b"


def test_every_profile_of_ours_has_a_name_and_every_rule_of_others_a_source() -> None:
    assert set(PROFILES) <= set(POLICIES)
    for name in ("lmetric", "dynamo_kv", "sglang_cache_aware", "aibrix_prefix_cache"):
        assert POLICIES[name].source
    assert [policy.name for policy in chosen("pooled, random,random")] == ["pooled", "random"]


def test_each_number_of_a_preset_names_its_source() -> None:
    for preset in presets().values():
        assert set(preset.source) == {"block_size", "max_tokens", "max_sequences", "kv_tokens"} | set(
            preset.timing.__struct_fields__
        )
        preset.shape(16)
