"""The endpoints of a pod, named after its ranks, and how its engine's API counts them."""

from __future__ import annotations

import pytest

from matrixinfer.config import PodConfig, PodWatchConfig
from matrixinfer.pods.engine_kind import EngineFacts, EngineKind, kind_of
from matrixinfer.pods.load_reports import FRESH_SECONDS, parse_load
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import EngineMetrics, Pod, PodRegistry, RankMetrics, ServedNames

REPORT = b"\x96\xa8LoadStat\x03\x02\x64\xcd\x03\xe8\x00"


def fleet(*names: str) -> PodRegistry:
    registry = PodRegistry(
        [PodConfig(name=name, url=f"http://{name}") for name in names], (), PodWatchConfig(), clock=lambda: 0.0
    )
    for name in names:
        served = ServedNames(base_model="m", aliases=frozenset({"m"}), adapters={})
        registry.learn(name, served=served)
        registry.answered(name)
    return registry


def sources(*ranks: int | None) -> tuple[KvSource, ...]:
    return tuple(KvSource(endpoint=f"tcp://h:{n}", rank=rank) for n, rank in enumerate(ranks))


def metrics(*ranks: int, asleep: bool = False) -> EngineMetrics:
    return EngineMetrics(
        running=0,
        waiting=0,
        cache_usage=0.0,
        read_at=0.0,
        sleep="discard_all" if asleep else None,
        ranks={rank: RankMetrics() for rank in ranks},
    )


def names(pod: Pod) -> list[str]:
    return [endpoint.name for endpoint in pod.endpoints]


@pytest.mark.parametrize(
    ("listed", "shown", "expected"),
    [
        ((), (), ["a"]),
        ((None,), (0, 1), ["a"]),
        ((3,), (), ["a"]),
        ((0, 1), (), ["a@dp0", "a@dp1"]),
        ((8, 9), (8, 9), ["a@dp8", "a@dp9"]),
        ((0, 2), (0, 1, 2, 3), ["a@dp0", "a@dp1", "a@dp2", "a@dp3"]),
        ((0, 1), (8, 9), ["a@dp0", "a@dp1"]),
    ],
)
def test_endpoints_are_called_after_the_ranks(
    listed: tuple[int | None, ...], shown: tuple[int, ...], expected: list[str]
) -> None:
    registry = fleet("a")
    registry.learn("a", kv_sources=sources(*listed))
    registry.measured("a", metrics(*shown))
    assert names(registry.pods[0]) == expected


@pytest.mark.parametrize(
    ("listed", "shown", "rank", "position"),
    [((0, 1), (), 1, 1), ((8, 9), (), 9, 1), ((9, 10), (8, 9, 10), 9, 1), ((0, 1), (8, 9), 1, 1)],
)
def test_an_engine_s_api_counts_the_ranks_that_it_serves_from_0_on(
    listed: tuple[int, ...], shown: tuple[int, ...], rank: int, position: int
) -> None:
    registry = fleet("a")
    registry.learn("a", kv_sources=sources(*listed))
    registry.measured("a", metrics(*shown))
    assert registry.position("a", rank) == position


def test_the_number_of_ranks_is_the_largest_that_anything_says() -> None:
    registry = fleet("a")
    (pod,) = registry.pods
    assert pod.rank_count == 1
    registry.learn("a", kv_sources=sources(0, 1))
    assert pod.rank_count == 2
    registry.measured("a", metrics(0, 1, 2))
    assert pod.rank_count == 3
    registry.learn("a", facts=EngineFacts(kind="sglang", ranks=4))
    assert (pod.rank_count, pod.engine) == (4, "sglang")
    registry.measured("a", metrics())
    registry.learn("a", facts=EngineFacts(kind="sglang"))
    assert pod.rank_count == 2


@pytest.mark.parametrize(("owner", "kind"), [("vllm", "vllm"), ("sglang", "sglang"), ("other", None), (None, None)])
def test_the_owner_of_the_models_names_the_kind(owner: str | None, kind: str | None) -> None:
    assert kind_of(owner) == kind


@pytest.mark.parametrize(
    ("kind", "architecture", "hides"),
    [
        ("sglang", "GptOssForCausalLM", True),
        ("sglang", "Qwen3NextForCausalLM", True),
        ("sglang", "Qwen3ForCausalLM", False),
        ("sglang", "Gemma3ForCausalLM", False),
        ("vllm", "GptOssForCausalLM", False),
    ],
)
def test_sglang_hides_components_of_hybrid_models(kind: EngineKind, architecture: str, hides: bool) -> None:
    assert EngineFacts(kind=kind, architectures=(architecture,)).hides_components == hides


def test_a_sleeping_pod_gets_requests_only_if_no_other_is_awake() -> None:
    registry = fleet("a", "b")

    def resolved() -> list[str]:
        return [pod.name for pod in registry.resolve("m")[1]]

    registry.measured("a", metrics(asleep=True))
    assert resolved() == ["b"]
    registry.measured("b", metrics(asleep=True))
    assert resolved() == ["a", "b"]
    registry.measured("a", metrics())
    assert resolved() == ["a"]
    for _ in range(2):
        registry.failed("a")
    assert resolved() == ["b"]  # rather asleep than down


def test_published_load_counts_while_it_is_fresh() -> None:
    registry = fleet("a")
    (endpoint,) = registry.pods[0].endpoints
    report = parse_load(REPORT, read_at=10.0)
    assert report is not None
    registry.published_load("a", "a@dp7", report)
    registry.published_load("gone", "a", report)
    assert registry.load_of(endpoint, 10.0) is None
    registry.published_load("a", "a", report)
    assert registry.load_of(endpoint, 10.0 + FRESH_SECONDS) is report
    assert registry.load_of(endpoint, 10.1 + FRESH_SECONDS) is None
    registry.learn("a", kv_sources=sources(0, 1))
    assert registry.pods[0].loads == {}
