"""The server processes that `proxy` measures: `python -m bench.servers KIND [URL [POLICY]]`.

Each prints its URL when it is ready, and ends when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from bench.prompts import MODEL, tokenizer_path
from bench.tiny import Engine, response
from matrixinfer.app.service import Service
from matrixinfer.config import (
    Config,
    LogConfig,
    ModelConfig,
    OutliersConfig,
    PodConfig,
    PodWatchConfig,
    SchedulerConfig,
)
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.telemetry.log import configure

_CHUNK_SECONDS = 0.002
"""Pause between two chunks: without it, a proxy would forward many chunks at once, at almost no cost."""

_MODELS = msgspec.json.encode({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
_METRICS = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="bench"} 1
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="bench"} 0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="bench"} 0.25
"""
_CHOICE = {"index": 0, "message": {"role": "assistant", "content": "x" * 400}, "finish_reason": "stop"}
_ANSWER = msgspec.json.encode({"id": "chatcmpl-0", "object": "chat.completion", "model": MODEL, "choices": [_CHOICE]})
_DELTA = {"index": 0, "delta": {"content": " token"}, "finish_reason": None}
_CHUNK = b"data: %b\n\n" % msgspec.json.encode(
    {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": MODEL, "choices": [_DELTA]}
)
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"})

_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
_Decide = Callable[[bytes], Awaitable[None]]


class _Request(msgspec.Struct):
    stream: bool = False
    max_tokens: int = 1


async def answer(request: web.BaseRequest) -> web.StreamResponse:
    """A minimal engine: a fixed answer, or `max_tokens` fixed chunks at a fixed rate."""
    if request.method == "GET":
        known = {"/v1/models": _MODELS, "/metrics": _METRICS, "/health": b""}
        if request.path not in known:
            return web.Response(status=404)
        text = "text/plain" if request.path == "/metrics" else "application/json"
        return web.Response(body=known[request.path], content_type=text)
    request_body = msgspec.json.decode(await request.read(), type=_Request)
    if not request_body.stream:
        return web.Response(body=_ANSWER, content_type="application/json")
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(request_body.max_tokens):
        await response.write(_CHUNK)
        await asyncio.sleep(_CHUNK_SECONDS)
    await response.write(b"data: [DONE]\n\n")
    return response


async def _no_decision(body: bytes) -> None:
    """Decide nothing."""


@asynccontextmanager
async def bare(engine: str, decide: _Decide = _no_decision) -> AsyncIterator[str]:
    """A minimal aiohttp proxy: reads the body, forwards it, and copies the response as it arrives."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def forward(request: web.BaseRequest) -> web.StreamResponse:
            body = await request.read()
            await decide(body)
            headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
            async with session.request(request.method, engine + request.path, data=body, headers=headers) as got:
                copied = {name: value for name, value in got.headers.items() if name.lower() not in _HOP_BY_HOP}
                if got.content_length is not None:
                    return web.Response(status=got.status, headers=copied, body=await got.read())
                response = web.StreamResponse(status=got.status, headers=copied)
                await response.prepare(request)
                async for chunk in got.content.iter_any():
                    await response.write(chunk)
                return response

        async with _serving(forward) as url:
            yield url


@asynccontextmanager
async def deciding(engine: str, policy: str) -> AsyncIterator[str]:
    """The bare proxy, with a routing decision for every request."""
    async with _service(engine, policy) as service:

        async def decide(body: bytes) -> None:
            async with service.router.dispatch(CHAT_PATH, body, request_id="bench") as request:
                request.first_byte()

        async with bare(engine, decide) as url:
            yield url


@asynccontextmanager
async def gateway(engine: str, policy: str) -> AsyncIterator[str]:
    """The gateway as shipped."""
    async with _service(engine, policy) as service:
        yield service.gateway.url


@asynccontextmanager
async def dashboard(engine: str, pods: str) -> AsyncIterator[str]:
    """The gateway with so many pods, and the URL of its admin listener after that of its API."""
    async with _service(engine, "kv_aware", pods=int(pods), admin="127.0.0.1:0") as service:
        yield f"{service.gateway.url} {service.gateway.admin_url}"


def _service(engine: str, policy: str, *, pods: int = 4, admin: str | None = None) -> Service:
    """A gateway whose pods are all the same engine."""
    config = Config(
        listen="127.0.0.1:0",
        admin=admin,
        models=(ModelConfig(name=MODEL, tokenizer=str(tokenizer_path()), chat_template="chatml"),),
        pods=tuple(PodConfig(name=f"pod-{i}", url=engine, kv_events="none") for i in range(pods)),
        scheduler=with_policy(SchedulerConfig(), policy),
        # On a busy machine the minimal engine may be late: that is not what is measured.
        pod_watch=PodWatchConfig(unhealthy_after_failures=1_000),
        outliers=OutliersConfig(consecutive_failures=1_000, failure_share=1.0),
    )
    configure(LogConfig(level="warning"))  # requests are logged at a lower level, so this costs as much as the default
    return Service(config)


@asynccontextmanager
async def _serving(handler: _Handler) -> AsyncIterator[str]:
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def tiny() -> AsyncIterator[str]:
    """The least engine."""
    answers = {b"/v1/models": response(_MODELS), b"/metrics": response(_METRICS, b"text/plain")}
    answers |= {b"/health": response(b""), CHAT_PATH.encode(): response(_ANSWER)}
    server = await asyncio.get_running_loop().create_server(lambda: Engine(answers), "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"


@asynccontextmanager
async def upstream() -> AsyncIterator[str]:
    """The minimal engine."""
    async with _serving(answer) as url:
        yield url


async def main(kind: str, *arguments: str) -> None:
    kinds: dict[str, Callable[..., AbstractAsyncContextManager[str]]] = {
        "upstream": upstream,
        "bare": bare,
        "deciding": deciding,
        "gateway": gateway,
        "dashboard": dashboard,
        "tiny": tiny,
    }
    async with kinds[kind](*arguments) as url:
        print(url, flush=True)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
        await ended.wait()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
