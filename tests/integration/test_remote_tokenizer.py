"""The remote tokenizer against a server that answers as vLLM 0.32 does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.prompt.requests import parse

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HELLO = [{"content": "hello", "role": "user"}]


async def vllm(request: web.Request) -> web.StreamResponse:
    """A reply as captured from the engine."""
    return web.json_response({"count": 2, "max_model_len": 8192, "tokens": [9707, 1879], "token_strs": None})


@dataclass
class Engine:
    """A real server on a free port whose answer each test chooses."""

    handler: Handler = vllm
    bodies: list[Any] = field(default_factory=list)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(json.loads(await request.read()))
        return await self.handler(request)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    app = web.Application()
    app.router.add_post("/tokenize", made.handle)
    async with TestServer(app) as server:
        made.url = str(server.make_url(""))
        yield made


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


def text(value: str, **fields: Any) -> Prompt:
    return parse(COMPLETIONS_PATH, json.dumps({"model": "alias", "prompt": value} | fields).encode())


def chat(**fields: Any) -> Prompt:
    return parse(CHAT_PATH, json.dumps({"model": "alias", "messages": HELLO} | fields).encode())


async def test_a_text_is_asked_for_as_vllm_expects(engine: Engine, session: aiohttp.ClientSession) -> None:
    ids = await RemoteTokenizer(session).tokenize(text("hello world"), engine.url, "tiny", timeout_seconds=0.5)
    assert ids.tolist() == [9707, 1879]
    assert ids.dtype.name == "uint32"
    assert engine.bodies == [{"model": "tiny", "prompt": "hello world", "add_special_tokens": True}]


async def test_a_chat_is_asked_for_as_vllm_expects(engine: Engine, session: aiohttp.ClientSession) -> None:
    await RemoteTokenizer(session).tokenize(chat(), engine.url.rstrip("/"), "tiny", timeout_seconds=0.5)
    assert engine.bodies == [
        {
            "model": "tiny",
            "messages": HELLO,
            "add_generation_prompt": True,
            "continue_final_message": False,
            "add_special_tokens": False,
        }
    ]
    assert list(engine.bodies[0]["messages"][0]) == ["content", "role"]


async def test_everything_that_changes_the_ids_is_passed_on(engine: Engine, session: aiohttp.ClientSession) -> None:
    fields = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template": "{{ messages }}",
        "add_generation_prompt": False,
        "continue_final_message": True,
        "add_special_tokens": True,
    }
    more = {"chat_template_kwargs": {"mood": 1}, "documents": [{"text": "d"}], "temperature": 1}
    await RemoteTokenizer(session).tokenize(chat(**fields, **more), engine.url, "tiny", timeout_seconds=0.5)
    (body,) = engine.bodies
    assert body.pop("chat_template_kwargs") == {"mood": 1, "documents": [{"text": "d"}]}
    assert body == {"model": "tiny", "messages": HELLO} | fields


def answering(status: int = 200, body: bytes = b"") -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers={"Location": "/tokenize"} if status == 302 else None)

    return handler


async def breaking(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cutting(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"tokens":[1,')
    assert request.transport is not None
    request.transport.abort()
    return response


async def hanging(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(5)
    return web.Response()


async def dripping(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'{"tokens":[')
    await asyncio.sleep(5)
    return response


async def flooding(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100):
        await response.write(b'{"tokens":[' + b"1," * 1000)
    return response


@pytest.mark.parametrize(
    "handler",
    [
        answering(400, b'{"error":{"message":"prompt lists are not supported"}}'),
        answering(404),
        answering(500),
        answering(302),
        answering(200, b""),
        answering(200, b"not json"),
        answering(200, b"\xff"),
        answering(200, b'{"count":0}'),
        answering(200, b'{"tokens":null}'),
        answering(200, b'{"tokens":["a"]}'),
        answering(200, b'{"tokens":[-1]}'),
        answering(200, b'{"tokens":[4294967296]}'),
        breaking,
        cutting,
        hanging,
        dripping,
        flooding,
    ],
)
async def test_every_failure_is_a_tokenize_error(
    engine: Engine, session: aiohttp.ClientSession, handler: Handler
) -> None:
    engine.handler = handler
    remote = RemoteTokenizer(session, max_response_bytes=10_000)
    with pytest.raises(TokenizeError):
        await remote.tokenize(text("x"), engine.url, "tiny", timeout_seconds=0.5)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "not a url", "http://[bad"])
async def test_an_engine_out_of_reach_is_a_tokenize_error(session: aiohttp.ClientSession, url: str) -> None:
    with pytest.raises(TokenizeError):
        await RemoteTokenizer(session).tokenize(text("x"), url, "tiny", timeout_seconds=0.5)
