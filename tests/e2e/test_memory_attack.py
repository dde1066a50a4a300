"""Clients that send as much as they can: memory stays bounded, and everybody else is served."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import web

from tests import servers
from tests.waiting import eventually

from .fleet import TOKENIZER
from .production import WORKERS, Production, production
from .test_serve import gateway

MEGABYTE = 1024 * 1024
CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
MEMORY = 256 * MEGABYTE
USER = b'{"role":"user","content":"x"}'
LARGE = {
    "empty messages": (CHAT, b'{"model":"m","messages":[%s{}]}' % (b"{}," * 20_000_000)),
    "ids": (TEXT, b'{"model":"m","prompt":[%s1]}' % (b"1," * 30_000_000)),
    "text": (TEXT, b'{"model":"m","prompt":"%s"}' % (b"a" * 60_000_000)),
    "image": (
        CHAT,
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:%s"}}]}]}'
        % (b"A" * 60_000_000),
    ),
    "unknown field": (
        MESSAGES,
        b'{"model":"m","max_tokens":2,"messages":[%s],"x":[%s1]}' % (USER, b"[]," * 20_000_000),
    ),
}
MIDDLE = {
    "empty messages": (CHAT, b'{"model":"m","messages":[%s{}]}' % (b"{}," * 1_300_000)),
    "messages": (CHAT, b'{"model":"m","messages":[%s%s]}' % ((USER + b",") * 130_000, USER)),
    "prompts": (TEXT, b'{"model":"m","prompt":[%s"x"]}' % (b'"x",' * 1_000_000)),
    "braces": (TEXT, b'{"model":"m","prompt":"%s"}' % (b"{[," * 1_300_000)),
}


class Engine:
    """An engine that reads bodies without keeping them, and answers when it `may`."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.may.set()
        self.waiting = 0

    async def answer(self, request: web.Request) -> web.Response:
        async for _ in request.content.iter_any():
            pass
        self.waiting += 1
        await self.may.wait()
        self.waiting -= 1
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return web.json_response({"id": "x", "model": "m", "choices": [], "usage": usage})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]})

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application(client_max_size=2**40)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        for path in (CHAT, TEXT, MESSAGES):
            app.router.add_post(path, self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


class Rig(NamedTuple):
    engine: Engine
    url: str
    pids: Sequence[int]
    """Of the processes that take requests."""
    session: aiohttp.ClientSession
    context: ssl.SSLContext | None = None
    headers: Mapping[str, str] = MappingProxyType({})

    async def send(self, path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the answer; 0 if the connection broke before an answer could be read."""
        host, port = self.url.rpartition("/")[2].split(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=self.context)
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items()).encode()

        async def write() -> None:
            head = b"POST %s HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n"
            writer.write(head % (path.encode(), fields, len(body)))
            for start in range(0, len(body), MEGABYTE):
                writer.write(body[start : start + MEGABYTE])
                await writer.drain()

        writing = asyncio.create_task(write())
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            named = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
            answer = await reader.readexactly(int(named.get("content-length", 0)))
            return int(head[0].split()[1]), named, answer
        except (ConnectionError, asyncio.IncompleteReadError):
            return 0, {}, b""
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            writer.close()

    async def metric(self, name: str) -> float:
        async with self.session.get(f"{self.url}/metrics") as response:
            found = re.search(rf"^{re.escape(name)} (\S+)$", await response.text(), flags=re.MULTILINE)
        return 0.0 if found is None else float(found[1])

    def memory(self, field: str) -> int:
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids]
        found = [re.search(rf"^{field}:\s+(\d+) kB", text, flags=re.MULTILINE) for text in texts]
        return sum(0 if each is None else int(each[1]) * 1024 for each in found)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Counter[str]]:
        """Meanwhile /health is asked and small chats are sent; afterwards the counts say how they were answered."""
        seen: Counter[str] = Counter()
        ends = asyncio.Event()

        async def keep_asking(name: str, ask: Callable[[], Any]) -> None:
            while not ends.is_set():
                async with ask() as response:
                    await response.read()
                    seen[f"{name} {response.status}"] += 1
                await asyncio.sleep(0.01)

        def small() -> Any:
            chat = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
            return self.session.post(self.url + CHAT, json=chat)

        async with asyncio.TaskGroup() as group:
            group.create_task(keep_asking("health", lambda: self.session.get(f"{self.url}/health")))
            group.create_task(keep_asking("small", small))
            yield seen
            ends.set()


@asynccontextmanager
async def rig(tmp_path: Path, settings: Production | None = None) -> AsyncIterator[Rig]:
    engine, file = Engine(), tmp_path / "gateway.yaml"
    more = {} if settings is None else settings.config
    context = None if settings is None else settings.context
    headers = {} if settings is None else {"Authorization": f"Bearer {settings.keys[0]}"}
    connector = aiohttp.TCPConnector(ssl=context or True)
    async with engine.running() as url, aiohttp.ClientSession(connector=connector, headers=headers) as session:
        config = {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "models": [{"name": "m", "tokenizer": str(TOKENIZER), "chatTemplate": "chatml"}],
            "pods": [{"name": "e", "url": url, "kvEvents": "none"}],
            "limits": {"memoryBytes": MEMORY * more.get("workers", 1)},  # divided among them
            **more,
        }
        file.write_text(json.dumps(config), encoding="utf-8")
        async with gateway("--config", str(file)) as (process, addresses):
            pids = children_of(process.pid) if "workers" in more else [process.pid]
            target = Rig(engine, addresses["listen"], pids, session, context, headers)

            async def serves() -> bool:
                async with session.get(f"{target.url}/ready") as response:
                    return response.status == 200

            await eventually(serves)
            yield target


def children_of(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def check(seen: Counter[str]) -> None:
    assert {each for each in seen if each.startswith("health")} == {"health 200"}
    assert {each for each in seen if each.startswith("small")} == {"small 200"}


async def test_large_bodies_take_no_more_than_the_memory_for_requests(tmp_path: Path) -> None:
    async with rig(tmp_path) as target:
        before = target.memory("VmRSS")
        async with target.watched() as seen:
            answers = await asyncio.gather(*(target.send(*each) for _ in range(2) for each in LARGE.values()))
        check(seen)
        assert target.memory("VmHWM") - before < 2 * MEMORY
        statuses = Counter(status for status, _, _ in answers)
        assert set(statuses) <= {200, 503, 0}
        assert statuses[200] >= 1
        assert await target.metric("matrixinfer_requests_refused_total") >= statuses[503] > 0
        await eventually_free(target)


async def test_nor_with_everything_on(tmp_path: Path, valkey: servers.Server) -> None:
    settings = production(tmp_path, redis=valkey.port, places=64, concurrent=64)
    async with rig(tmp_path, settings) as target:
        before = target.memory("VmRSS")
        large, middle = LARGE.values(), MIDDLE.values()
        async with target.watched() as seen:
            answers = await asyncio.gather(*(target.send(*each) for each in (*large, *middle, *large, *middle)))
        check(seen)
        assert target.memory("VmHWM") - before < 2 * MEMORY * WORKERS
        statuses = Counter(status for status, _, _ in answers)
        assert set(statuses) <= {200, 503, 0}
        assert statuses[200] >= 1
        await eventually_free(target)


async def test_refusals_have_the_shape_of_the_api(tmp_path: Path) -> None:
    async with rig(tmp_path) as target:
        target.engine.may.clear()
        first = asyncio.create_task(target.send(*LARGE["text"]))
        await eventually(lambda: target.engine.waiting == 1)
        for path in (CHAT, MESSAGES):
            status, headers, answer = await target.send(path, LARGE["text"][1])
            assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
            error = json.loads(answer)
            assert error["error"]["type"] == ("overloaded_error" if path == MESSAGES else "server_error")
            assert "The gateway holds as many bytes of requests as it may" in error["error"]["message"]
        small = asyncio.create_task(target.send(CHAT, b'{"model":"m","messages":[%s]}' % USER))
        await eventually(lambda: target.engine.waiting == 2)
        assert await target.metric("matrixinfer_request_bytes") > 2 * 60_000_000
        target.engine.may.set()
        assert [(await first)[0], (await small)[0]] == [200, 200]
        await eventually_free(target)


@pytest.mark.parametrize("name", MIDDLE)
async def test_many_small_values_keep_nobody_from_being_tokenized(tmp_path: Path, name: str) -> None:
    async with rig(tmp_path) as target:
        before = target.memory("VmRSS")
        async with target.watched() as seen:
            answers = await asyncio.gather(*(target.send(*MIDDLE[name]) for _ in range(8)))
        check(seen)
        assert {status for status, _, _ in answers} <= {200, 503}
        assert target.memory("VmHWM") - before < 2 * MEMORY
        routed = sum(status == 200 for status, _, _ in answers)
        assert await target.metric('matrixinfer_degraded_total{reason="tokenize"}') <= routed
        await eventually_free(target)


async def eventually_free(target: Rig) -> None:
    async def is_free() -> bool:
        return await target.metric("matrixinfer_request_bytes") == 0

    await eventually(is_free)
