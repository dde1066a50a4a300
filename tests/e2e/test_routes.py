"""Aliases, splits, headers and adapters, from the client's request to the engine and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from matrixinfer.app.service import Service
from matrixinfer.config import (
    ModelConfig,
    PluginRef,
    PluginsConfig,
    PluginStage,
    PodWatchConfig,
    RouteConfig,
    RouteTarget,
    SchedulerConfig,
    checked,
)
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine
from tests.waiting import eventually

from .fleet import TOKENIZER, Fleet, config_of

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
ROUTES = (
    RouteConfig(name="blue", headers={"x-team": "blue"}, targets=(RouteTarget(model="org/new"),)),
    RouteConfig(
        name="split",
        models=("gpt",),
        targets=(RouteTarget(model="org/old", weight=3), RouteTarget(model="org/new", weight=1)),
    ),
    RouteConfig(name="canary", models=("org/old",), targets=(RouteTarget(pods=("pod-1",)),)),
)


@asynccontextmanager
async def routed(
    tokenizer: LocalTokenizer, *engines: SimEngineConfig, routes: tuple[RouteConfig, ...] = ROUTES, **more: Any
) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(SimEngine(engine, tokenizer)) for engine in engines]
        names = dict.fromkeys(engine.model for engine in engines)
        models = tuple(ModelConfig(name=name, tokenizer=str(TOKENIZER), chat_template="chatml") for name in names)
        config = msgspec.structs.replace(config_of(running), models=models, routes=routes, **more)
        service = await stack.enter_async_context(Service(checked(config)))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Fleet(engines=running, service=service, session=session)


OLD, NEW = SimEngineConfig(model="org/old"), SimEngineConfig(model="org/new")


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "word " * 300}], **more}


async def ask(target: Fleet, body: dict[str, Any], **headers: str) -> tuple[dict[str, Any], str]:
    async with target.session.post(target.url + CHAT, json=body, headers=headers) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer, response.headers["x-matrixinfer-pod"]


async def test_a_split_gives_each_session_one_engine_and_the_client_its_own_name(tokenizer: LocalTokenizer) -> None:
    async with routed(tokenizer, OLD, NEW, NEW) as target:
        pods = {}
        for user in ("ann", "bob", "cho", "dan", "eve", "fay", "gus", "hal"):
            answer, pod = await ask(target, chat("gpt", user=user))
            assert answer["model"] == "gpt"
            pods[user] = "old" if pod == "pod-0" else "new"
            for _ in range(2):
                _, again = await ask(target, chat("gpt", user=user))
                assert pods[user] == ("old" if again == "pod-0" else "new")
                _, again = await ask(target, chat("gpt", user="other"), **{"x-session-id": user})
                assert pods[user] == ("old" if again == "pod-0" else "new")
        assert set(Counter(pods.values())) == {"old", "new"}
        counted = await target.metric('matrixinfer_route_requests_total{route="split",target="org/old"}')
        assert counted == sum(5 for where in pods.values() if where == "old")
        async with target.session.get(f"{target.url}/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["gpt", "org/new", "org/old"]


async def test_a_stream_has_the_clients_name_and_the_cache_the_engines(tokenizer: LocalTokenizer) -> None:
    async with routed(tokenizer, OLD, NEW, NEW) as target:
        body = chat("gpt", user="ann")
        async with target.session.post(target.url + CHAT, json={**body, "stream": True}) as response:
            lines = [line for line in (await response.text()).splitlines() if line.startswith("data: {")]
        assert {json.loads(line.removeprefix("data: "))["model"] for line in lines} == {"gpt"}

        async def is_known() -> bool:
            decision = await target.explain(CHAT, body)
            return bool(decision["predicted_hit_tokens"] > 200)

        await eventually(is_known, pause=0.05)
        decision = await target.explain(CHAT, body)
        assert decision["model"] in ("org/old", "org/new")
        assert decision["notes"][0].startswith(f"route split: goes to {decision['model']}, weight ")
        answer, _ = await ask(target, body)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 200


async def test_headers_decide_before_models(tokenizer: LocalTokenizer) -> None:
    async with routed(tokenizer, OLD, NEW, NEW) as target:
        for _ in range(3):
            answer, pod = await ask(target, chat("gpt"), **{"x-team": "blue"})
            assert (answer["model"], pod != "pod-0") == ("gpt", True)


async def test_a_canary_of_one_model_gets_its_pods_only(tokenizer: LocalTokenizer) -> None:
    async with routed(tokenizer, OLD, OLD, OLD) as target:
        for i in range(4):
            _, pod = await ask(target, chat("org/old", user=f"{i}"))
            assert pod == "pod-1"
        target.service.leave("pod-1")
        async with target.session.post(target.url + CHAT, json=chat("org/old")) as response:
            assert response.status == 503
            assert "route canary" in (await response.json())["error"]["message"]


async def test_requests_for_an_adapter_prefer_the_pod_that_has_it_loaded(tokenizer: LocalTokenizer) -> None:
    engine = SimEngineConfig(model="m", loras=("poet", "judge"), max_loras=1)
    scorers = (PluginRef(name="lora-affinity", weight=10.0), PluginRef(name="least-request"))
    plugins = PluginsConfig(score=PluginStage(enabled=scorers))
    watch = PodWatchConfig(scrape_interval_seconds=0.05)
    more: dict[str, Any] = {"scheduler": SchedulerConfig(plugins=plugins), "pod_watch": watch, "routes": ()}
    async with routed(tokenizer, engine, engine, engine, **more) as target:
        _, poets = await ask(target, chat("poet"))

        async def is_seen() -> bool:
            decision = await target.explain(CHAT, chat("poet"))
            return bool(decision["pods"][poets]["scores"]["lora-affinity"] == 100)

        await eventually(is_seen, pause=0.05)
        for i in range(3):
            _, pod = await ask(target, {**chat("poet"), "messages": [{"role": "user", "content": f"{i} " * 50}]})
            assert pod == poets
        _, judges = await ask(target, chat("judge"))
        assert judges != poets
        plain = await target.explain(CHAT, chat("m"))
        assert {pod["scores"]["lora-affinity"] for pod in plain["pods"].values()} == {0}
