"""A model that no engine has reported is asked for before it is refused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web

from matrixinfer.app.service import Service
from matrixinfer.config import Config, ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.pods import model_search
from matrixinfer.pods.model_search import ModelSearch
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.pods.session import client_session
from matrixinfer.pods.watcher import PodWatcher
from tests.integration.gateway_support import FOREVER, LOOPBACK, pod
from tests.waiting import DEADLINE_SECONDS, eventually

Ask = Callable[..., Awaitable[tuple[int, Any]]]

WATCH = PodWatchConfig(
    scrape_interval_seconds=0.05, scrape_timeout_seconds=DEADLINE_SECONDS, discovery_interval_seconds=FOREVER
)


class Engine:
    """Serves `tiny` and whatever adapters are loaded, and records the bodies that it gets."""

    def __init__(self, model: str = "tiny") -> None:
        self.model = model
        self.adapters: list[str] = []
        self.asked = 0
        self.is_slow = False
        self.bodies: list[dict[str, object]] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/models":
            self.asked += 1
            if self.is_slow:
                await asyncio.sleep(FOREVER)
            cards = [{"id": self.model, "owned_by": "vllm"}]
            return web.json_response({"data": cards + [{"id": name, "parent": self.model} for name in self.adapters]})
        if request.method == "POST":
            self.bodies.append(json.loads(await request.read()))
            return web.json_response({"ok": True})
        return web.Response(text="" if request.path in ("/health", "/metrics") else "[]")


@dataclass
class Searched:
    registry: PodRegistry
    search: ModelSearch

    async def find(self, name: str) -> bool:
        return await self.search(lambda: self.registry.is_served(name))


@asynccontextmanager
async def searching(*urls: str) -> AsyncIterator[Searched]:
    registry = PodRegistry([PodConfig(name=url, url=url) for url in urls], (), WATCH, clock=time.monotonic)
    async with (
        client_session() as session,
        PodWatcher(registry, session, WATCH) as watcher,
        ModelSearch(registry, watcher.ask_models) as search,
    ):
        assert await watcher.first_round(DEADLINE_SECONDS)
        yield Searched(registry, search)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_search, "PAUSE_SECONDS", 0.0)


async def test_an_adapter_is_found_as_soon_as_it_is_loaded() -> None:
    first, second = Engine(), Engine()
    async with pod(first) as one, pod(second) as other, searching(one, other) as searched:
        assert not await searched.find("late")
        second.adapters.append("late")
        assert await searched.find("late")
        assert [each.url for each in searched.registry.resolve("late")[1]] == [other]


@pytest.mark.usefixtures("no_pause")
async def test_a_slow_engine_delays_nobody_who_is_served_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Engine(), Engine()
    async with pod(first) as one, pod(second) as other, searching(one, other) as searched:
        first.is_slow = True
        second.adapters.append("late")
        async with asyncio.timeout(model_search.WAIT_SECONDS / 2):
            assert await searched.find("late")
        monkeypatch.setattr(model_search, "WAIT_SECONDS", 0.1)
        assert not await searched.find("none")
        assert first.asked == 2  # the question on its way is shared
        assert searched.registry.pods[0].healthy


async def test_many_who_ask_at_once_are_one_question_and_the_next_waits_its_turn() -> None:
    engine = Engine()
    async with pod(engine) as url, searching(url) as searched:
        began, before = time.monotonic(), engine.asked
        answers = await asyncio.gather(*(searched.find(f"none-{number}") for number in range(200)))
        assert not any(answers)
        assert engine.asked == before + 1
        await asyncio.gather(*(searched.find(f"none-{number}") for number in range(200)))
        assert engine.asked == before + 2
        assert time.monotonic() - began >= model_search.PAUSE_SECONDS


@pytest.mark.usefixtures("no_pause")
async def test_a_client_that_leaves_does_not_end_the_question_of_another() -> None:
    engine = Engine()
    async with pod(engine) as url, searching(url) as searched:
        engine.adapters.append("late")
        leaving, staying = (asyncio.create_task(searched.find("late")) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying
        await eventually(leaving.cancelled)


@pytest.mark.usefixtures("no_pause")
async def test_an_engine_that_has_become_another_is_found_under_its_new_name() -> None:
    engine = Engine()
    async with pod(engine) as url, searching(url) as searched:
        engine.model = "other"
        assert await searched.find("other")
        assert not searched.registry.is_served("tiny")


@asynccontextmanager
async def gateway(*urls: str, models: tuple[ModelConfig, ...] = ()) -> AsyncIterator[Ask]:
    config = Config(
        listen=f"{LOOPBACK}:0",
        admin=None,
        pods=tuple(PodConfig(name=f"pod-{i}", url=url, kv_events="none") for i, url in enumerate(urls)),
        models=models,
        pod_watch=WATCH,
    )
    async with Service(config) as service, client_session() as session:

        async def ask(path: str, body: dict[str, object] | None = None) -> tuple[int, Any]:
            method = "GET" if body is None else "POST"
            async with session.request(method, service.gateway.url + path, json=body) as response:
                return response.status, await response.json()

        yield ask


CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {**CHAT, "max_tokens": 1}),
        ("/v1/messages/count_tokens", CHAT),
        ("/v1/embeddings", {"input": "x"}),
        ("/score", {"queries": "x", "documents": ["y"]}),
        ("/rerank", {"query": "x", "documents": ["y"]}),
    ],
)
async def test_no_api_needs_a_model_where_one_is_served(path: str, body: dict[str, object]) -> None:
    engine = Engine()
    engine.adapters.append("lora")
    async with pod(engine) as url, gateway(url) as ask:
        assert await ask(path, body) == (200, {"ok": True})
        assert await ask(path, {**body, "model": None}) == (200, {"ok": True})
        sent = [each for each in engine.bodies if "prompt" not in each or path == "/v1/completions"]
        assert sent[-1] == {**body, "model": "tiny"}


async def test_a_model_must_be_named_where_several_are_served() -> None:
    async with pod(Engine()) as one, pod(Engine("big")) as other, gateway(one, other) as ask:
        status, answer = await ask("/v1/chat/completions", CHAT)
        assert (status, answer["error"]["param"]) == (400, "model")
        assert "several models are served" in answer["error"]["message"]
        status, answer = await ask("/v1/messages", {**CHAT, "max_tokens": 1})
        assert (status, answer["type"], answer["error"]["type"]) == (400, "error", "invalid_request_error")


async def test_a_freshly_loaded_adapter_answers_at_once_and_has_its_page() -> None:
    engine = Engine()
    async with pod(engine) as url, gateway(url) as ask:
        assert (await ask("/v1/chat/completions", {**CHAT, "model": "late"}))[0] == 404
        assert (await ask("/v1/models/later"))[0] == 404
        engine.adapters += ["late", "later"]
        status, card = await ask("/v1/models/later")
        assert (status, card["parent"]) == (200, "tiny")
        engine.adapters.append("latest")
        assert await ask("/v1/chat/completions", {**CHAT, "model": "latest"}) == (200, {"ok": True})


async def test_a_configured_model_is_asked_for_as_well() -> None:
    engine = Engine()
    async with pod(engine) as url, gateway(url, models=(ModelConfig(name="late", aliases=("nice",)),)) as ask:
        assert (await ask("/v1/chat/completions", {**CHAT, "model": "nice"}))[0] == 503
        engine.adapters.append("late")
        assert await ask("/v1/chat/completions", {**CHAT, "model": "nice"}) == (200, {"ok": True})
