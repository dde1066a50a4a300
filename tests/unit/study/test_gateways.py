"""Several gateways decide as well as one. Virtual time: equal figures on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, median

from matrixinfer.study import presets
from matrixinfer.study.fleet import Fleet
from matrixinfer.study.generators import generate
from matrixinfer.study.policies import POLICIES
from matrixinfer.study.runs import replay
from matrixinfer.study.trace import Alphabet, Trace

from .test_replay import of, turn

ENGINE = presets.preset("llama-70b-4xh100")
SHARED = generate("shared-prefix", seed=0).first(300, most_tokens=100_000)
CACHE = 11_000
"""Tokens of a pod's cache: sixteen of them hold the prefixes about once."""


def results(trace: Trace, **fleet: object) -> Mapping[str, float]:
    made = Fleet(**{"shape": ENGINE.shape(trace.block_size), "pods": 16, "pod_tokens": CACHE, **fleet})  # type: ignore[arg-type]
    found = replay(trace, made, POLICIES["kv_aware"]).results
    return {key: value for key, value in found.items() if value is not None}


def test_gateways_that_talk_are_as_good_as_one() -> None:
    one = results(SHARED)
    for gateways in (2, 4):
        several = results(SHARED, gateways=gateways, gossip=True)
        assert several["hit_rate"] > one["hit_rate"] - 0.02
        assert several["ttft_mean_s"] < 1.05 * one["ttft_mean_s"]


def test_gateways_that_share_an_index_and_talk_are_as_good_as_one() -> None:
    one, several = results(SHARED), results(SHARED, gateways=4, gossip=True, shared_index=True)
    assert several["hit_rate"] > one["hit_rate"] - 0.02
    assert several["ttft_mean_s"] < 1.05 * one["ttft_mean_s"]


def test_silent_gateways_do_not_fill_the_pod_that_was_idle() -> None:
    silent = [results(SHARED, gateways=4, seed=seed) for seed in range(6)]
    assert mean(each["hit_rate"] for each in silent) > results(SHARED)["hit_rate"] - 0.05
    assert median(each["ttft_p99_s"] for each in silent) < 0.9  # one gateway 0.2; without what engines store 1.5


def bursts() -> Trace:
    """Eight requests at once every three seconds, which have nothing in common."""
    letters = Alphabet()
    return of(*(turn(letters, 8_000, 50, delay=n // 8 * 3.0) for n in range(320)))


def test_gateways_that_get_requests_in_the_same_moment_choose_different_pods() -> None:
    trace = bursts()
    means = [
        results(trace, pod_tokens=100_000, gateways=gateways, gossip=gossip)["ttft_mean_s"]
        for gateways, gossip in ((1, False), (4, True), (4, False))
    ]
    assert means[1] < 1.05 * means[0]
    assert means[2] < 1.3 * means[0]
