"""A gateway with keys before it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from matrixinfer.access.key_file import hash_of
from matrixinfer.app.service import Service
from matrixinfer.config import parse
from tests.integration.gateway_support import pod

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: Any


@dataclass
class Client:
    service: Service
    session: aiohttp.ClientSession
    texts: dict[str, str]

    async def reload(self, text: str) -> dict[str, Any]:
        """Let the gateway read its configuration again, which is this now."""
        self.texts["now"] = text
        async with self.session.post(f"{self.service.gateway.admin_url}/admin/reload") as response:
            outcome: dict[str, Any] = await response.json()
            return outcome

    async def post(
        self, key: str | None = None, *, path: str = CHAT, headers: Mapping[str, str] | None = None, **body: Any
    ) -> Answer:
        """Send a chat; with `key` as a bearer token."""
        sent = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4} | body
        given = dict(headers or {}) | ({} if key is None else {"Authorization": f"Bearer {key}"})
        async with self.session.post(self.service.gateway.url + path, json=sent, headers=given) as response:
            text = await response.read()
            is_json = "json" in response.headers.get("content-type", "")
            return Answer(response.status, response.headers, await response.json() if is_json else text)

    async def metric(self, series: str) -> float:
        """A value of the gateway's metrics; 0 for a series that is not there."""
        lines = (await self.get("/metrics")).body.splitlines()
        return next((float(line.removeprefix(series)) for line in lines if line.startswith(f"{series} ")), 0.0)

    async def get(self, path: str, key: str | None = None, **headers: str) -> Answer:
        given = dict(headers) | ({} if key is None else {"Authorization": f"Bearer {key}"})
        async with self.session.get(self.service.gateway.url + path, headers=given) as response:
            text = await response.text()
            is_json = "json" in response.headers.get("content-type", "")
            return Answer(response.status, response.headers, await response.json() if is_json else text)


class Engine:
    """Serves some models, remembers what it got, and reports a usage."""

    def __init__(self, *models: str) -> None:
        self.models = models or ("tiny",)
        self.heads: list[CIMultiDict[str]] = []
        self.bodies: list[Any] = []
        self.usage = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}
        self.status = 200

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": name, "owned_by": "vllm"} for name in self.models]})
        if request.method != "POST":
            return web.Response(text="" if request.path in ("/health", "/metrics") else "[]")
        if request.path == "/tokenize":
            count = len(json.loads(await request.read())["messages"][-1]["content"])
            return web.json_response({"tokens": [*range(count)], "count": count})
        self.heads.append(CIMultiDict(request.headers))
        self.bodies.append(json.loads(await request.read()))
        return await self.answer(request)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"choices": [], "usage": self.usage}, status=self.status)


def key_file(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Path:
    """A file of keys, in which `key` stands for its hash."""
    file = folder / "keys.yaml"
    listed = [{**{k: v for k, v in each.items() if k != "key"}, "hash": hash_of(each["key"])} for each in entries]
    new = file.with_suffix(".new")
    new.write_text(f"keys: {listed}".replace("None", "null"))
    new.rename(file)
    return file


@asynccontextmanager
async def gateway(text: str, *engines: Engine, base: Path) -> AsyncIterator[Client]:
    """A gateway with this configuration before engines, named a, b, …"""
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(pod(engine)) for engine in engines]
        pods = ", ".join(
            f'{{name: {name}, url: "{url}", kvEvents: none}}' for name, url in zip("abcdefgh", urls, strict=False)
        )
        head = f"listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\npods: [{pods}]\ntokenization: {{find: none}}\n"
        texts = {"now": text}
        service = Service(parse(head + text, base=base), read=lambda: parse(head + texts["now"], base=base))
        await stack.enter_async_context(service)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield Client(service, session, texts)
