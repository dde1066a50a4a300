"""The pods of a model that are kept are those that would be found again, and the same tuple has not changed."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from matrixinfer.config import ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.errors import NoPodAvailable, UnknownModel
from matrixinfer.pods.engine_kind import EngineFacts
from matrixinfer.pods.pod import Drain, EngineMetrics, Pod, RankMetrics, ServedNames
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import PodRegistry

NAMES = ("tiny", "alias", "lora", "big", "other")
TINY = ServedNames(base_model="tiny", aliases=frozenset({"tiny"}), adapters={"lora": "tiny"}, engine="vllm")
SERVED = (
    TINY,
    ServedNames(base_model="tiny", aliases=frozenset({"tiny"}), adapters={}, engine="sglang"),
    ServedNames(base_model="/models/tiny", aliases=frozenset({"/models/tiny", "tiny"}), adapters={"lora": "tiny"}),
    ServedNames(base_model="big", aliases=frozenset({"big"}), adapters={}),
)
FACTS = (
    EngineFacts(kind="vllm", version="0.32.0"),
    EngineFacts(kind="vllm", version="0.33.0"),
    EngineFacts(kind="sglang"),
)
WATCH = PodWatchConfig(unhealthy_after_failures=2)
MODELS = (ModelConfig(name="tiny"),)
ALIASED = (ModelConfig(name="tiny", aliases=("alias",)),)


def sources(count: int) -> tuple[KvSource, ...]:
    return tuple(KvSource(endpoint=f"tcp://h:{rank}", rank=rank) for rank in range(count))


def reading(*, asleep: bool = False, ranks: int = 0) -> EngineMetrics:
    return EngineMetrics(
        running=1,
        waiting=0,
        cache_usage=None,
        read_at=0.0,
        sleep="paused" if asleep else None,
        ranks={rank: RankMetrics() for rank in range(ranks)},
    )


def join_or_leave(fleet: PodRegistry, name: str) -> None:
    if fleet.leave(name) is None:
        fleet.join(PodConfig(name=name, url=f"http://{name}", model="tiny"))


def drain_or_not(fleet: PodRegistry, name: str) -> None:
    pod = fleet.pod(name)
    if pod is not None:
        fleet.set_drain(pod, Drain(0.0, 1.0) if pod.drain is None else None)


ACTS: tuple[Callable[[PodRegistry, str, int], object], ...] = (
    lambda fleet, pod, n: fleet.learn(pod, served=SERVED[n]),
    lambda fleet, pod, n: fleet.learn(pod, facts=FACTS[n % len(FACTS)]),
    lambda fleet, pod, n: fleet.learn(pod, kv_sources=sources(n)),
    lambda fleet, pod, n: fleet.measured(pod, reading(asleep=n == 0)),
    lambda fleet, pod, n: fleet.measured(pod, reading(ranks=n)),
    lambda fleet, pod, n: fleet.answered(pod),
    lambda fleet, pod, n: fleet.failed(pod),
    lambda fleet, pod, n: drain_or_not(fleet, pod),
    lambda fleet, pod, n: join_or_leave(fleet, pod),
    lambda fleet, pod, n: fleet.reconfigure(WATCH, ALIASED if n else MODELS),
)
STEPS = st.lists(st.tuples(st.sampled_from(ACTS), st.sampled_from("ab"), st.integers(0, 3)), max_size=12)


def resolved(fleet: PodRegistry, name: str) -> tuple[str, tuple[Pod, ...]] | str:
    try:
        model, pods = fleet.resolve(name)
    except (NoPodAvailable, UnknownModel) as error:
        return f"{type(error).__name__}: {error}"
    assert isinstance(pods, tuple)
    return model, pods


def traits(pods: tuple[Pod, ...]) -> list[object]:
    """What others remember by the tuple of pods."""
    return [(pod.base_model, pod.engine, pod.version, pod.endpoints) for pod in pods]


@given(STEPS)
@settings(max_examples=300)
def test_what_is_kept_is_what_would_be_found(steps: list[tuple[Callable[..., object], str, int]]) -> None:
    fleet = PodRegistry([PodConfig(name=name, url=f"http://{name}") for name in "ab"], MODELS, WATCH, clock=lambda: 0.0)
    for pod in "ab":
        fleet.learn(pod, served=TINY)
        fleet.answered(pod)
    fleet.learn("a", kv_sources=sources(2))
    for act, pod, n in steps:
        before = {name: found for name in NAMES if not isinstance(found := resolved(fleet, name), str)}
        known = {name: traits(pods) for name, (_, pods) in before.items()}
        configured = {name: fleet.configured_name(model, pods) for name, (model, pods) in before.items()}
        act(fleet, pod, n)
        kept = {name: resolved(fleet, name) for name in NAMES}
        named = {name: fleet.configured_name(*found) for name, found in kept.items() if not isinstance(found, str)}
        for name, found in kept.items():
            if name in before and not isinstance(found, str) and found[1] is before[name][1]:
                assert traits(found[1]) == known[name]
                assert named[name] == configured[name]
        fleet._serves_another()  # noqa: SLF001 - forget what is kept
        assert {name: resolved(fleet, name) for name in NAMES} == kept
        for name, found in kept.items():
            assert isinstance(found, str) or fleet.configured_name(*found) == named[name]


def test_the_same_pods_are_the_same_tuple() -> None:
    fleet = PodRegistry([PodConfig(name="a", url="http://a")], MODELS, WATCH, clock=lambda: 0.0)
    fleet.learn("a", served=TINY)
    fleet.answered("a")
    _, first = fleet.resolve("tiny")
    fleet.measured("a", reading())
    fleet.learn("a", served=TINY, facts=FACTS[0])
    _, second = fleet.resolve("tiny")
    assert second is not first
    fleet.learn("a", served=TINY, facts=FACTS[0])
    fleet.measured("a", reading())
    assert fleet.resolve("tiny")[1] is second
