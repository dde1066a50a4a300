"""Watching real endpoints: discovery, health, load, and engines that go and come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog
from aiohttp import web

from matrixinfer.app.served import served_models
from matrixinfer.config import PodConfig, PodWatchConfig
from matrixinfer.pods.engine_api import EngineApi, EngineDown
from matrixinfer.pods.engine_kind import EngineFacts
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.pods.session import client_session
from matrixinfer.pods.watcher import PodWatcher
from tests.integration.gateway_support import FOREVER, nowhere, pod
from tests.ports import free_port
from tests.waiting import DEADLINE_SECONDS, eventually

FAST = PodWatchConfig(
    scrape_interval_seconds=0.02, scrape_timeout_seconds=DEADLINE_SECONDS, discovery_interval_seconds=60
)


class Engine:
    """The parts of an engine that are watched; `down` makes it answer 500, `slow` not in time, `dead` only without what is behind its API."""

    def __init__(self, model: str = "tiny") -> None:
        self.model = model
        self.running = 3
        self.started = 100
        self.extra = ""
        self.down = self.slow = self.locked = self.dead = False
        self.asked: list[str] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request.path)
        if self.slow:
            await asyncio.sleep(FOREVER)
        if self.down:
            return web.Response(status=500)
        if self.locked and request.path.startswith("/v1"):
            return web.Response(status=401)
        if self.dead and request.path == "/health":
            return web.Response(status=503)
        answers = {
            "/health": "",
            "/v1/models": f'{{"data":[{{"id":"{self.model}"}}]}}',
            "/kv_event_sources": '[{"endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558"}]',
            "/version": '{"version":"0.33.0"}',
            "/metrics": f'vllm:num_requests_running{{engine="0"}} {self.running}\n'
            f"process_start_time_seconds {self.started}\n{self.extra}",
        }
        return web.Response(text=answers[request.path])


@asynccontextmanager
async def watching(
    *urls: str, config: PodWatchConfig = FAST, found: list[Pod] | None = None
) -> AsyncIterator[tuple[PodRegistry, PodWatcher]]:
    pods = [PodConfig(name=f"pod-{i}", url=url) for i, url in enumerate(urls)]
    registry = PodRegistry(pods, (), config, clock=time.monotonic)
    hook = None if found is None else found.append
    async with (
        client_session() as session,
        PodWatcher(registry, session, config, on_discovered=hook) as watcher,
    ):
        yield registry, watcher


async def test_a_pod_is_discovered_measured_and_found_healthy() -> None:
    engine = Engine()
    found: list[Pod] = []
    async with pod(engine) as url, watching(url, found=found) as (registry, watcher):
        assert await watcher.first_round(DEADLINE_SECONDS)
        (state,) = registry.pods
        assert state.healthy
        assert state.base_model == "tiny"
        assert state.kv_sources == (KvSource(endpoint="tcp://127.0.0.1:5557", replay_endpoint="tcp://127.0.0.1:5558"),)
        metrics = registry.metrics_of(state, time.monotonic())
        assert metrics is not None
        assert metrics.running == 3
        engine.running = 8
        await eventually(lambda: state.metrics is not None and state.metrics.running == 8)
        assert found == [state]
        assert engine.asked.count("/v1/models") == 1


async def test_a_pod_without_event_sources_or_metrics_is_healthy_and_publishes_nowhere() -> None:
    async def bare(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.Response(text='{"data":[{"id":"tiny"}]}')
        return web.Response(status=404)

    async with pod(bare) as url, watching(url) as (registry, watcher):
        assert await watcher.first_round(DEADLINE_SECONDS)
        (state,) = registry.pods
        assert (state.healthy, state.kv_sources) == (True, ())
        assert state.metrics is not None
        assert state.metrics.running is None


async def test_a_pod_that_does_not_tell_its_models_is_still_healthy() -> None:
    engine = Engine()
    engine.locked = True
    found: list[Pod] = []
    async with pod(engine) as url, watching(url, found=found) as (registry, watcher):
        assert await watcher.first_round(DEADLINE_SECONDS)
        assert registry.pods[0].healthy
        assert registry.pods[0].served is None
        assert found == [registry.pods[0]]  # its publishers are known


async def test_the_first_round_ends_at_its_deadline_when_a_pod_is_silent() -> None:
    async with pod(Engine()) as url, watching(url, nowhere()) as (registry, watcher):
        assert not await watcher.first_round(0.2)
        assert [state.healthy for state in registry.pods] == [True, False]


async def test_the_first_round_does_not_wait_for_dead_pods() -> None:
    began = time.monotonic()
    async with watching(nowhere()) as (_, watcher):  # refuses connections
        assert not await watcher.first_round(FOREVER)
    silent = Engine()
    silent.slow = True
    async with (
        pod(Engine()) as one,
        pod(Engine()) as other,
        pod(silent) as never,
        watching(one, nowhere(), other, never) as (registry, watcher),
    ):
        assert not await watcher.first_round(FOREVER, others_seconds=0.5)
        assert [state.healthy for state in registry.pods] == [True, False, True, False]
    assert time.monotonic() - began < 5


async def test_without_pods_there_is_nothing_to_wait_for() -> None:
    async with watching() as (_, watcher):
        assert await watcher.first_round(0.1)


@pytest.mark.parametrize("fault", ["down", "slow", "dead"])
async def test_a_pod_that_fails_is_unhealthy_after_failures_in_a_row_and_returns(fault: str) -> None:
    engine = Engine()
    config = PodWatchConfig(scrape_interval_seconds=0.02, scrape_timeout_seconds=0.1)
    async with pod(engine) as url, watching(url, config=config) as (registry, watcher):
        await watcher.first_round(DEADLINE_SECONDS)
        (state,) = registry.pods
        setattr(engine, fault, True)
        await eventually(lambda: not state.healthy)
        assert state.failures >= config.unhealthy_after_failures
        setattr(engine, fault, False)
        await eventually(lambda: state.healthy)
        assert state.failures == 0


async def test_an_engine_that_comes_back_as_another_is_discovered_again() -> None:
    found: list[Pod] = []
    port = free_port()
    async with pod(Engine(), port) as url:
        stack = watching(url, found=found)
        registry, watcher = await stack.__aenter__()
        await watcher.first_round(DEADLINE_SECONDS)
    try:
        await eventually(lambda: not registry.pods[0].healthy)
        async with pod(Engine("other"), port):
            await eventually(lambda: registry.pods[0].base_model == "other")
            assert len(found) == 2
    finally:
        await stack.__aexit__(None, None, None)


async def test_a_change_of_health_is_logged_once_not_at_every_look() -> None:
    engine = Engine()
    with structlog.testing.capture_logs() as logs:
        async with pod(engine) as url, watching(url) as (registry, watcher):
            await watcher.first_round(DEADLINE_SECONDS)
            engine.down = True
            await eventually(lambda: registry.pods[0].failures > 4)
            engine.down = False
            await eventually(lambda: registry.pods[0].healthy)
            await asyncio.sleep(0.1)
    events = [entry["event"] for entry in logs]
    assert events == ["pod_discovered", "pod_came_up", "pod_went_down", "pod_came_up"]
    assert logs[2]["reason"].endswith("answered 500")


async def test_a_fault_while_reading_one_pod_ends_neither_its_watch_nor_the_others() -> None:
    calls = 0

    def hook(state: Pod) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a fault of ours")

    async with pod(Engine()) as url, client_session() as session:
        registry = PodRegistry([PodConfig(name="a", url=url)], (), FAST, clock=time.monotonic)
        with structlog.testing.capture_logs() as logs:
            async with PodWatcher(registry, session, FAST, on_discovered=hook) as watcher:
                assert await watcher.first_round(DEADLINE_SECONDS)
        assert calls == 2
        assert "pod_watch_failed" in [entry["event"] for entry in logs]


async def test_leaving_the_context_passes_the_caller_s_error_as_it_is() -> None:
    async with pod(Engine()) as url:
        with pytest.raises(ZeroDivisionError):
            async with watching(url):
                raise ZeroDivisionError


async def test_an_endless_answer_is_refused() -> None:
    async def endless(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 262144)

    async with pod(endless) as url, client_session() as session:
        with pytest.raises(EngineDown, match="more than"):
            await EngineApi(session, 5.0).metrics(url, now=0.0)


async def test_pods_that_come_are_watched_until_they_go() -> None:
    found: list[Pod] = []
    engine = Engine()
    async with pod(engine) as url, watching(url, found=found) as (registry, watcher):
        await watcher.first_round(DEADLINE_SECONDS)
        late = registry.join(PodConfig(name="late", url=url))
        watcher.watch(late)
        await eventually(lambda: late.healthy and late.metrics is not None)
        assert found[-1] is late
        registry.leave("late")
        watcher.unwatch("late")
        watcher.unwatch("late")
        await asyncio.sleep(0)
        assert list(watcher._tasks) == list(watcher._announced) == ["pod-0"]  # noqa: SLF001 - nothing stays


async def test_an_engine_that_restarts_between_two_readings_is_asked_what_it_is_before_they_count() -> None:
    engine = Engine()
    with structlog.testing.capture_logs() as logs:
        async with pod(engine) as url, watching(url) as (registry, watcher):
            await watcher.first_round(DEADLINE_SECONDS)
            (state,) = registry.pods
            assert (state.engine, state.facts) == ("vllm", EngineFacts(kind="vllm", version="0.33.0"))
            engine.model, engine.started = "other", 200
            await eventually(lambda: state.base_model == "other")
            assert engine.asked.count("/v1/models") == 2
            engine.started = 300
            await eventually(lambda: engine.asked.count("/v1/models") == 3)
    events = [entry["event"] for entry in logs]
    assert events == ["pod_discovered", "pod_came_up", "pod_restarted", "pod_discovered"]


async def test_a_pod_is_asked_again_at_once_when_somebody_wants_to_know() -> None:
    engine = Engine()
    slow = PodWatchConfig(scrape_interval_seconds=60, discovery_interval_seconds=600)
    asked: list[str] = []
    async with pod(engine) as url, client_session() as session:
        registry = PodRegistry([PodConfig(name="a", url=url)], (), slow, clock=time.monotonic)
        async with PodWatcher(
            registry,
            session,
            slow,
            on_asking=lambda pod: asked.append(f"asking {pod.name}"),
            on_told=lambda pod: asked.append(f"told {pod.name}"),
        ) as watcher:
            await watcher.first_round(DEADLINE_SECONDS)
            watcher.ask_again("unknown")
            for _ in range(5):
                watcher.ask_again("a")
            await eventually(lambda: len(asked) == 4)
            await asyncio.sleep(0.2)
    assert asked == ["asking a", "told a"] * 2


async def test_a_failed_reading_has_the_pod_asked_again_before_it_is_down() -> None:
    engine = Engine()
    config = PodWatchConfig(scrape_interval_seconds=0.02, unhealthy_after_failures=10**6)
    async with pod(engine) as url, watching(url, config=config) as (registry, watcher):
        await watcher.first_round(DEADLINE_SECONDS)
        engine.dead = True
        await eventually(lambda: registry.pods[0].failures > 0)
        engine.dead, engine.model = False, "other"
        await eventually(lambda: registry.pods[0].base_model == "other")
        assert registry.pods[0].healthy


async def test_sleep_is_logged_when_it_begins_and_when_it_ends() -> None:
    engine = Engine()
    with structlog.testing.capture_logs() as logs:
        async with pod(engine) as url, watching(url) as (registry, watcher):
            await watcher.first_round(DEADLINE_SECONDS)
            engine.extra = 'vllm:engine_sleep_state{sleep_state="awake"} 0\n'
            await eventually(lambda: registry.pods[0].asleep == "paused")
            await asyncio.sleep(0.1)
            engine.extra = 'vllm:engine_sleep_state{sleep_state="awake"} 1\n'
            await eventually(lambda: registry.pods[0].asleep is None)
    told = [
        (entry["event"], entry.get("state")) for entry in logs if "sleep" in entry["event"] or "woke" in entry["event"]
    ]
    assert told == [("pod_fell_asleep", "paused"), ("pod_woke_up", None)]


INFO = {
    "version": "0.5.23",
    "dp_size": 1,
    "internal_states": [],
    "kv_events": {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "dp_size": 1},
}
AT = KvSource(endpoint="tcp://127.0.0.1:5557", rank=0)


@pytest.mark.parametrize(
    ("owner", "answers", "kind", "version", "sources"),
    [
        ("vllm", {"/version": {"version": "0.28.0"}}, "vllm", "0.28.0", ()),
        ("vllm", {}, "vllm", None, ()),
        (None, {"/kv_event_sources": {"0": {"endpoint": "tcp://*:5557"}}}, "vllm", None, (AT,)),
        ("sglang", {"/server_info": INFO}, "sglang", "0.5.23", (AT,)),
        ("sglang", {"/get_server_info": INFO}, "sglang", "0.5.23", (AT,)),
        (
            "sglang",
            {"/kv_event_sources": [{"endpoint": "tcp://*:5557", "data_parallel_rank": 0}]},
            "sglang",
            None,
            (AT,),
        ),
        (None, {"/server_info": INFO}, "sglang", "0.5.23", (AT,)),
        ("sglang", {}, "sglang", None, ()),
        ("somebody", {"/version": {"version": "1.3"}}, "other", "1.3", ()),
        (None, {"/server_info": 500}, "other", None, ()),
        ("sglang", {"/server_info": 500}, None, None, None),
    ],
)
async def test_the_kind_of_engine_is_found_by_asking(
    owner: str | None, answers: dict[str, Any], kind: str | None, version: str | None, sources: object
) -> None:
    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        answer = answers.get(request.path, 404)
        return web.Response(status=answer) if isinstance(answer, int) else web.json_response(answer)

    async with pod(engine) as url, client_session() as session:
        about = await EngineApi(session, 5.0).about(url, owner)
    assert about.sources == sources
    assert (about.facts and about.facts.kind, about.facts and about.facts.version) == (kind, version)


async def test_sglang_names_the_class_of_its_model() -> None:
    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        answers: dict[str, Any] = {"/server_info": INFO, "/model_info": {"architectures": ["GptOssForCausalLM"]}}
        return web.json_response(answers[request.path])

    async with pod(engine) as url, client_session() as session:
        about = await EngineApi(session, 5.0).about(url, "sglang")
    assert about.facts is not None
    assert about.facts.architectures == ("GptOssForCausalLM",)


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
async def test_sglang_says_where_its_tokenizer_and_its_model_are(path: str) -> None:
    paths = {"model_path": "org/model", "tokenizer_path": "/models/tokenizer"}
    served = {"data": [{"id": "m", "root": "m", "owned_by": "sglang"}]}

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        answers: dict[str, Any] = {"/server_info": INFO, path: paths, "/v1/models": served}
        answer = answers.get(request.path)
        return web.Response(status=404) if answer is None else web.json_response(answer)

    async with pod(engine) as url, client_session() as session:
        about = await EngineApi(session, 5.0).about(url, "sglang")
        names = await EngineApi(session, 5.0).models(url)
        registry = PodRegistry([PodConfig(name="a", url=url)], (), PodWatchConfig(), clock=lambda: 0.0)
        registry.learn("a", served=names, facts=about.facts)
    assert [each.roots for each in served_models(registry)["m"]] == [("/models/tokenizer", "org/model")]
    registry.learn("a", facts=EngineFacts(kind="sglang"))
    assert [each.roots for each in served_models(registry)["m"]] == [()]
    registry.learn("a", facts=EngineFacts(kind="vllm"))
    assert [each.roots for each in served_models(registry)["m"]] == [("m",)]
