"""Conversations that begin with an image, through a whole gateway with a real tokenizer, before engines without events."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from matrixinfer.app.service import Service
from matrixinfer.config import Config, ModelConfig, PodConfig, SchedulerConfig, checked
from matrixinfer.scheduler.policies import with_policy

from .fleet import TOKENIZER

CHAT = "/v1/chat/completions"
IMAGE_TOKENS = 300
WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "theta", "kappa"]


async def answer(request: web.Request) -> web.Response:
    """Count a token per four characters, and the image."""
    body = await request.json()
    tokens = 0
    for message in body["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        tokens += sum(len(part["text"]) // 4 if "text" in part else IMAGE_TOKENS for part in parts)
    message = {"role": "assistant", "content": "ok"}
    return web.json_response(
        {"choices": [{"index": 0, "message": message}], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    )


async def models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]})


async def health(_: web.Request) -> web.Response:
    return web.Response()


@dataclass
class Client:
    service: Service
    session: aiohttp.ClientSession

    async def chat(self, messages: list[dict[str, Any]]) -> str:
        async with self.session.post(self.service.gateway.url + CHAT, json=self._body(messages)) as response:
            assert response.status == 200
            return response.headers["x-matrixinfer-pod"]

    async def explain(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        url = f"{self.service.gateway.admin_url}/debug/route"
        async with self.session.post(url, params={"path": CHAT}, json=self._body(messages)) as response:
            decision: dict[str, Any] = await response.json()
            return decision

    def _body(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        return {"model": "m", "messages": messages}


@asynccontextmanager
async def gateway(policy: str) -> AsyncIterator[Client]:
    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.get("/health", health), web.post(CHAT, answer)])
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(TestServer(app)) for _ in range(4)]
        config = Config(
            listen="127.0.0.1:0",
            admin="127.0.0.1:0",
            models=(ModelConfig(name="m", tokenizer=str(TOKENIZER), chat_template="chatml"),),
            pods=tuple(
                PodConfig(name=f"pod-{i}", url=str(s.make_url("")), kv_events="none") for i, s in enumerate(servers)
            ),
            scheduler=with_policy(SchedulerConfig(pending_seconds=0.0), policy),
        )
        service = await stack.enter_async_context(Service(checked(config)))
        yield Client(service, await stack.enter_async_context(aiohttp.ClientSession()))


def image(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def question(number: int, *, first: bool) -> dict[str, Any]:
    """A user's message of about 4,000 characters with an image, which comes first or after the text."""
    draw = random.Random(number)
    text = {"type": "text", "text": f"case {number}: " + " ".join(draw.choices(WORDS, k=700))}
    parts = [image(f"AAAA{number}"), text]
    return {"role": "user", "content": parts if first else parts[::-1]}


@pytest.mark.parametrize("policy", ["kv_aware", "cache_aware"])
@pytest.mark.parametrize("first", [True, False])
async def test_every_turn_of_a_conversation_with_an_image_goes_to_one_pod(policy: str, first: bool) -> None:
    async with gateway(policy) as client:
        conversations = [[question(number, first=first)] for number in range(8)]
        pods: list[set[str]] = [set() for _ in conversations]
        for turn in range(4):
            for messages, seen in zip(conversations, pods, strict=True):
                seen.add(await client.chat(messages))
                messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": f"and {turn}?"}]
        assert [len(seen) for seen in pods] == [1] * 8
        assert len(set().union(*pods)) > 1


async def test_what_is_estimated_comes_near_what_engines_count() -> None:
    async with gateway("kv_aware") as client:
        for number in range(20):
            await client.chat([question(number, first=True)])
        decision = await client.explain([question(99, first=True)])
        text = len(question(99, first=True)["content"][1]["text"]) // 4
        assert decision["tokens"] + decision["unknown_tokens"] == pytest.approx(text + IMAGE_TOKENS, rel=0.2)
