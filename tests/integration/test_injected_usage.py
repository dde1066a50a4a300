"""Usage that the gateway asks for and the client did not: what of an engine's answer reaches the client."""

from __future__ import annotations

import gzip
from collections.abc import Sequence

import pytest
from aiohttp import web

from tests.integration.gateway_support import pod, rig

EVENTS = b'data: {"choices":[{"index":0,"text":"a"}]}\n\ndata: {"choices":[{"index":1,"text":"b"}]}\n\n'
REPORT = b'data: {"choices":[],"usage":{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = EVENTS + REPORT + DONE
SSE = "text/event-stream; charset=utf-8"


class Engine:
    """Answers with these chunks, or with a body of a stated length."""

    def __init__(
        self, answer: bytes | Sequence[bytes], *, status: int = 200, kind: str = SSE, coding: str = ""
    ) -> None:
        self.answer = answer
        self.status = status
        self.headers = {"Content-Type": kind} | ({"Content-Encoding": coding} if coding else {})
        self.accepted: list[str | None] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        self.accepted.append(request.headers.get("Accept-Encoding"))
        if isinstance(self.answer, bytes):
            return web.Response(body=self.answer, status=self.status, headers=self.headers)
        response = web.StreamResponse(status=self.status, headers=self.headers)
        await response.prepare(request)
        for chunk in self.answer:
            await response.write(chunk)
        return response


async def answer_of(engine: Engine, *, injects: bool = True) -> tuple[bytes, str | None, list[str]]:
    """What the client gets, the length that was stated, and what was reported."""
    async with pod(engine) as url, rig(url) as gateway:
        gateway.rewriter.adds_usage = injects
        async with gateway.post(headers={"Accept-Encoding": "gzip"}) as response:
            assert response.status == engine.status
            return await response.read(), response.headers.get("Content-Length"), gateway.router.reports


@pytest.mark.parametrize(
    "chunks", [[STREAM], [STREAM[:50], STREAM[50:]], [STREAM[i : i + 1] for i in range(len(STREAM))]]
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
async def test_a_stream_comes_without_the_report(chunks: Sequence[bytes], end: bytes) -> None:
    engine = Engine([chunk.replace(b"\n", end) for chunk in chunks])
    got, _, reports = await answer_of(engine)
    assert got == (EVENTS + DONE).replace(b"\n", end)
    assert "usage a 7 4" in reports
    assert engine.accepted == ["identity"]


@pytest.mark.parametrize("padding", [0, 2 * 1024 * 1024])
async def test_a_stream_whose_length_was_stated_comes_without_it(padding: int) -> None:
    pad = b"data: " + b"x" * padding + b"\n\n"
    got, length, reports = await answer_of(Engine(pad + STREAM))
    assert got == pad + EVENTS + DONE
    assert length is None
    assert "usage a 7 4" in reports


async def test_without_asking_nothing_is_taken_out() -> None:
    engine = Engine([STREAM])
    got, _, reports = await answer_of(engine, injects=False)
    assert got == STREAM
    assert "usage a 7 4" in reports
    assert engine.accepted == ["gzip"]


@pytest.mark.parametrize(
    "engine",
    [
        Engine([gzip.compress(STREAM)], coding="gzip"),
        Engine([STREAM], kind="application/json"),
        Engine([STREAM], status=500),
        Engine(
            b'{"error":{"message":"no"},"choices":[],"usage":{"prompt_tokens":7}}', status=400, kind="application/json"
        ),
        Engine(b'{"choices":[],"usage":{"prompt_tokens":7}}', kind="application/json"),
    ],
    ids=["compressed", "no events", "failed", "refused", "whole"],
)
async def test_what_is_no_plain_stream_of_events_passes_as_it_is(engine: Engine) -> None:
    got, _, _ = await answer_of(engine)
    assert got == (engine.answer if isinstance(engine.answer, bytes) else b"".join(engine.answer))


async def test_an_error_within_a_stream_reaches_the_client() -> None:
    error = b'data: {"error":{"message":"out of memory","code":500}}\n\n'
    got, _, _ = await answer_of(Engine([EVENTS, error, DONE]))
    assert got == EVENTS + error + DONE
