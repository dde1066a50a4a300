from __future__ import annotations

from dataclasses import replace

import pytest

from matrixinfer.config import KvEventsConfig, ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.errors import InvalidRequest, NoPodAvailable, UnknownModel
from matrixinfer.pods.model_cards import ModelCard
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import EngineMetrics, PodRegistry, ServedNames

TINY = ServedNames(base_model="tiny", aliases=frozenset({"tiny", "tiny-x"}), adapters={"lora": "tiny"})
TINY_CARDS = replace(
    TINY,
    cards={
        "tiny": ModelCard(root="/models/tiny", max_model_len=2048, created=50),
        "lora": ModelCard(root="/loras/lora"),
    },
)
BIG = ServedNames(base_model="big", aliases=frozenset({"big"}), adapters={})


def registry(*pods: str, models: tuple[ModelConfig, ...] = (), failures: int = 2) -> PodRegistry:
    configs = [PodConfig(name=name, url=f"http://{name}") for name in pods]
    return PodRegistry(configs, models, PodWatchConfig(unhealthy_after_failures=failures), clock=lambda: 0.0)


def resolve(fleet: PodRegistry, requested: str) -> tuple[str, list[str]]:
    model, pods = fleet.resolve(requested)
    return model, [pod.name for pod in pods]


def test_without_pods_no_model_is_unknown_as_one_may_come() -> None:
    fleet = registry("a")
    fleet.learn("a", served=TINY)
    fleet.leave("a")
    for ask in (lambda: fleet.resolve("tiny"), fleet.only_model):
        with pytest.raises(NoPodAvailable, match="has no pods now"):
            ask()


def test_served_names_map_to_the_engine_s_own_and_adapters_to_themselves() -> None:
    fleet = registry("a", "b", "c")
    fleet.learn("a", served=TINY)
    fleet.learn("b", served=BIG)
    fleet.learn("c", served=TINY)
    assert resolve(fleet, "tiny") == ("tiny", ["a", "c"])
    assert resolve(fleet, "tiny-x") == ("tiny", ["a", "c"])
    assert resolve(fleet, "lora") == ("lora", ["a", "c"])
    assert resolve(fleet, "big") == ("big", ["b"])


def test_every_change_of_what_pods_serve_counts_from_the_next_request_on() -> None:
    fleet = registry("a", "b")
    fleet.learn("a", served=TINY)
    fleet.learn("b", served=TINY)
    assert resolve(fleet, "tiny") == ("tiny", ["a", "b"])
    fleet.learn("a", served=BIG)
    assert resolve(fleet, "tiny") == ("tiny", ["b"])
    fleet.join(PodConfig(name="c", url="http://c", model="tiny"))
    assert resolve(fleet, "tiny") == ("tiny", ["b", "c"])
    fleet.leave("b")
    assert resolve(fleet, "tiny") == ("tiny", ["c"])
    fleet.learn("c", served=BIG)
    with pytest.raises(UnknownModel):
        fleet.resolve("tiny")


def test_configured_aliases_are_rewritten_only_for_pods_that_do_not_know_them() -> None:
    fleet = registry("a", models=(ModelConfig(name="tiny", aliases=("small", "tiny-x")),))
    fleet.learn("a", served=TINY)
    assert resolve(fleet, "small") == ("tiny", ["a"])
    assert fleet.name_at("a", "small") == "tiny"
    assert fleet.name_at("a", "tiny-x") == "tiny-x"
    assert fleet.name_at("a", "lora") == "lora"


def test_an_unidentified_pod_is_assumed_to_serve_configured_models_that_no_other_pod_serves() -> None:
    fleet = registry("a", "b", models=(ModelConfig(name="tiny", aliases=("small",)),))
    assert resolve(fleet, "small") == ("tiny", ["a", "b"])
    assert fleet.name_at("a", "small") == "tiny"
    fleet.learn("a", served=TINY)
    assert resolve(fleet, "small") == ("tiny", ["a"])


def test_an_unidentified_pod_may_serve_another_one_of_several_configured_models() -> None:
    fleet = registry("a", "b", models=(ModelConfig(name="tiny"), ModelConfig(name="big")))
    for known in (False, True):
        if known:
            fleet.learn("a", served=TINY)
        with pytest.raises(NoPodAvailable, match=f": {1 if known else 2} have not answered yet"):
            fleet.resolve("big")
    fleet.answered("b")
    with pytest.raises(NoPodAvailable, match="1 do not say what they serve"):
        fleet.resolve("big")


def test_a_pod_serves_the_model_that_its_configuration_names_until_it_says_something_else() -> None:
    configs = [PodConfig(name="a", url="http://a", model="tiny"), PodConfig(name="b", url="http://b", model="big")]
    models = (ModelConfig(name="tiny", aliases=("small",)), ModelConfig(name="big"))
    fleet = PodRegistry(configs, models, PodWatchConfig(), clock=lambda: 0.0)
    assert resolve(fleet, "small") == ("tiny", ["a"])
    assert resolve(fleet, "big") == ("big", ["b"])
    assert [model.name for model in fleet.models()] == ["big", "small", "tiny"]
    fleet.learn("b", served=TINY)
    assert resolve(fleet, "tiny") == ("tiny", ["a", "b"])
    with pytest.raises(NoPodAvailable):
        fleet.resolve("big")


def test_endpoints_are_pods_or_their_ranks() -> None:
    fleet = registry("a", "b")
    fleet.learn("b", kv_sources=(KvSource(endpoint="tcp://b:1", rank=0), KvSource(endpoint="tcp://b:2", rank=1)))
    names = ("a", "a@dp0", "b", "b@dp1", "b@dp2", "c")
    assert [name for name in names if fleet.is_endpoint(name)] == ["a", "b@dp1"]


def test_a_name_is_unknown_only_once_every_pod_is_identified() -> None:
    fleet = registry("a", "b")
    fleet.learn("a", served=TINY)
    with pytest.raises(NoPodAvailable):
        fleet.resolve("big")
    fleet.learn("b", served=TINY)
    with pytest.raises(UnknownModel) as caught:
        fleet.resolve("big")
    assert caught.value.param == "model"
    assert "`GET /v1/models` lists those that do" in str(caught.value)


def test_a_configured_model_that_no_pod_serves_is_unavailable_not_unknown() -> None:
    fleet = registry("a", models=(ModelConfig(name="big"),))
    fleet.learn("a", served=TINY)
    with pytest.raises(NoPodAvailable):
        fleet.resolve("big")


def test_unhealthy_pods_are_left_out_unless_no_pod_is_healthy() -> None:
    fleet = registry("a", "b")
    for name in ("a", "b"):
        fleet.learn(name, served=TINY)
        fleet.answered(name)
    fleet.failed("a")
    assert resolve(fleet, "tiny") == ("tiny", ["a", "b"])
    fleet.failed("a")
    assert resolve(fleet, "tiny") == ("tiny", ["b"])
    fleet.failed("b")
    fleet.failed("b")
    assert resolve(fleet, "tiny") == ("tiny", ["a", "b"])
    fleet.answered("a")
    assert resolve(fleet, "tiny") == ("tiny", ["a"])


def test_only_consecutive_failures_count() -> None:
    fleet = registry("a", failures=2)
    fleet.answered("a")
    for _ in range(5):
        fleet.failed("a")
        assert fleet.pods[0].healthy
        fleet.answered("a")


def test_a_pod_is_not_healthy_before_it_has_answered() -> None:
    assert not registry("a").pods[0].healthy


def test_old_metrics_are_unknown() -> None:
    fleet = registry("a")
    pod = fleet.pods[0]
    assert fleet.metrics_of(pod, 0.0) is None
    metrics = EngineMetrics(running=1, waiting=0, cache_usage=None, read_at=10.0)
    fleet.measured("a", metrics)
    assert fleet.metrics_of(pod, 15.0) is metrics
    assert fleet.metrics_of(pod, 15.1) is None


def test_the_list_of_models_contains_the_names_that_resolve() -> None:
    alone = registry("a", models=(ModelConfig(name="tiny", aliases=("small",)),))
    assert [model.name for model in alone.models()] == ["small", "tiny"]
    fleet = registry("a", "b", models=(ModelConfig(name="tiny", aliases=("small",)), ModelConfig(name="gone")))
    assert fleet.models() == []
    fleet.learn("a", served=TINY)
    fleet.learn("b", served=BIG)
    models = fleet.models()
    assert [model.name for model in models] == ["big", "lora", "small", "tiny", "tiny-x"]
    assert {model.name: model.parent for model in models}["lora"] == "tiny"
    for model in models:
        fleet.resolve(model.name)


def test_a_request_without_a_model_means_the_only_one_whatever_its_adapters_and_names() -> None:
    fleet = registry("a", "b", models=(ModelConfig(name="tiny", aliases=("small",)),))
    fleet.learn("a", served=TINY)
    fleet.learn("b", served=TINY)
    assert resolve(fleet, fleet.only_model()) == ("tiny", ["a", "b"])
    unconfigured = registry("a")
    unconfigured.learn("a", served=BIG)
    assert unconfigured.only_model() == "big"


def test_a_request_without_a_model_means_the_configured_one_before_pods_have_answered() -> None:
    assert registry("a", models=(ModelConfig(name="tiny", aliases=("small",)),)).only_model() == "tiny"
    with pytest.raises(NoPodAvailable):
        registry("a").only_model()


@pytest.mark.parametrize("models", [(), (ModelConfig(name="tiny"),)])
def test_a_request_without_a_model_is_refused_where_there_are_several(models: tuple[ModelConfig, ...]) -> None:
    fleet = registry("a", "b", models=models)
    fleet.learn("a", served=TINY)
    fleet.learn("b", served=BIG)
    with pytest.raises(InvalidRequest, match=r"`model` is required.*`big`, `tiny`") as caught:
        fleet.only_model()
    assert caught.value.param == "model"


def test_the_list_of_models_says_what_engines_say() -> None:
    fleet = registry("a", "b", models=(ModelConfig(name="tiny", aliases=("small",)),))
    fleet.learn("a", served=TINY_CARDS)
    for length, created in ((4096, 70), (8192, 900)):
        other = {name: ModelCard(root="/other", max_model_len=length, created=created) for name in TINY_CARDS.cards}
        fleet.learn("b", served=replace(TINY_CARDS, cards=other))
    found = {model.name: model for model in fleet.models()}
    assert found["tiny"].card == ModelCard(root="/models/tiny", max_model_len=2048, created=50)
    assert found["small"].card == found["tiny"].card
    assert (found["lora"].parent, found["lora"].card.root) == ("tiny", "/loras/lora")
    assert found["lora"].card.max_model_len == 8192  # only b says it
    assert found["lora"].card.created == 70  # b's first word


def test_event_sources_are_unknown_only_if_the_engine_must_be_asked() -> None:
    configured, endpoint = KvEventsConfig(endpoint="tcp://h:1"), KvSource(endpoint="tcp://h:1")
    pods = [
        PodConfig(name="asked", url="http://a"),
        PodConfig(name="none", url="http://b", kv_events="none"),
        PodConfig(name="given", url="http://c", kv_events=configured),
    ]
    fleet = PodRegistry(pods, (), PodWatchConfig(), clock=lambda: 0.0)
    assert [pod.kv_sources for pod in fleet.pods] == [None, (), (endpoint,)]
    fleet.learn("asked", kv_sources=(endpoint,))
    assert fleet.pods[0].kv_sources == (endpoint,)
    fleet.learn("asked", served=TINY)
    assert fleet.pods[0].kv_sources == (endpoint,)


def test_a_model_may_be_configured_under_any_name_that_its_engines_know() -> None:
    fleet = registry("a", "b", models=(ModelConfig(name="tiny-x"), ModelConfig(name="huge", aliases=("big",))))
    fleet.learn("a", served=TINY)
    fleet.learn("b", served=BIG)
    assert [fleet.configured_name(model, fleet.pods) for model in ("tiny", "tiny-x", "big", "other")] == [
        "tiny-x",
        "tiny-x",
        "huge",
        "other",
    ]


def test_pods_join_and_leave_and_reports_about_former_pods_are_ignored() -> None:
    fleet = registry("a", models=(ModelConfig(name="tiny"),))
    fleet.learn("a", served=TINY)
    pod = fleet.join(PodConfig(name="b", url="http://b"))
    with pytest.raises(ValueError, match="`b` already"):
        fleet.join(PodConfig(name="b", url="http://other"))
    fleet.learn("b", served=BIG)
    assert resolve(fleet, "big") == ("big", ["b"])
    assert fleet.has("b", "b")
    assert not fleet.has("b", "b@dp0")
    assert fleet.names() == {"tiny", "tiny-x", "lora", "big"}
    assert fleet.leave("b") is pod
    assert pod.gone
    assert fleet.leave("b") is None
    assert not fleet.has("b", "b")
    assert fleet.names() == {"tiny", "tiny-x", "lora"}
    fleet.failed("b")
    fleet.answered("b")
    fleet.learn("b", served=TINY)
    fleet.measured("b", EngineMetrics(running=1, waiting=0, cache_usage=None, read_at=0.0))
    assert (pod.failures, pod.served, pod.metrics) == (0, BIG, None)
    assert fleet.name_at("b", "tiny-x") == "tiny-x"
    with pytest.raises(UnknownModel):
        fleet.resolve("big")
