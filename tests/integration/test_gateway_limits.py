"""Limits as clients meet them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from tests.integration.access_support import MESSAGES, Engine, gateway, key_file
from tests.waiting import eventually

LIMITS = "access: {keysFile: keys.yaml, limits: {windowSeconds: 3600, %s}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    key_file(tmp_path, [{"name": "a", "key": "sk-a"}, {"name": "b", "key": "sk-b", "limits": {"requests": 1}}])
    return tmp_path


class Streaming(Engine):
    """Answers in a stream, which reports its usage if it is asked to."""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
        if (self.bodies[-1].get("stream_options") or {}).get("include_usage"):
            await response.write(b"data: " + json.dumps({"choices": [], "usage": self.usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


class Held(Engine):
    """Answers once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = asyncio.Event()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await self.may_answer.wait()
        return await super().answer(request)


async def test_answers_say_what_is_left_and_429_says_when_there_is_more(folder: Path) -> None:
    async with gateway(LIMITS % "requests: 2, inputTokens: 1000", Engine(), base=folder) as client:
        first = await client.post("sk-a")
        assert (first.status, first.headers["x-ratelimit-remaining-requests"]) == (200, "1")
        assert (await client.post("sk-a")).headers[
            "x-ratelimit-remaining-input-tokens"
        ] == "985"  # 10 reported, 5 taken
        refused = await client.post("sk-a")
        assert (refused.status, refused.body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.body["error"]["type"] == "requests"
        assert 0 < int(refused.headers["Retry-After"]) <= 3600 * 13 / 12
        assert refused.headers["x-ratelimit-limit-requests"] == "2"
        refused = await client.post("sk-a", path=MESSAGES)
        assert (refused.status, refused.body["error"]["type"]) == (429, "rate_limit_error")
        assert [(await client.post("sk-b")).status for _ in range(2)] == [200, 429]  # its own limits


async def test_tokens_that_were_cached_are_free_of_the_limit_on_computed_ones(folder: Path) -> None:
    engine = Engine()
    async with gateway(LIMITS % "uncachedTokens: 20", engine, base=folder) as client:
        statuses = [(await client.post("sk-a")).status for _ in range(6)]  # 4 of 10 tokens are computed each time
    assert statuses == [200, 200, 200, 200, 429, 429]


async def test_a_stream_reports_its_usage_to_the_gateway_alone(folder: Path) -> None:
    engine = Streaming()
    async with gateway(LIMITS % "outputTokens: 12", engine, base=folder) as client:
        answer = await client.post("sk-a", stream=True)
        assert answer.status == 200
        assert b"usage" not in answer.body
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert [(await client.post("sk-a", stream=True)).status for _ in range(4)] == [200, 200, 429, 429]
        metrics = (await client.get("/metrics")).body
    assert 'matrixinfer_tenant_tokens_total{kind="output",tenant="a"} 12.0' in metrics


@pytest.mark.parametrize(("status", "left"), [(500, 3), (429, 3), (400, 0)])
async def test_what_the_engine_fails_is_not_charged(folder: Path, status: int, left: int) -> None:
    engine = Engine()
    engine.status = status
    engine.usage = {}
    async with gateway(LIMITS % "requests: 3", engine, base=folder) as client:
        assert [(await client.post("sk-a")).status for _ in range(3)] == [status] * 3
        engine.status = 200
        statuses = [(await client.post("sk-a")).status for _ in range(3)]
    assert statuses.count(200) == left


async def test_bounds_hold_however_many_requests_come_at_once(folder: Path) -> None:
    engine = Held()
    async with gateway(LIMITS % "requests: 20, concurrentRequests: 5", engine, base=folder) as client:
        sending = [asyncio.create_task(client.post("sk-a")) for _ in range(100)]
        done: list[int] = []
        while len(done) < 95:
            finished, _ = await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
            done += [task.result().status for task in finished]
            sending = [task for task in sending if task not in finished]
        assert set(done) == {429}
        engine.may_answer.set()
        assert [answer.status for answer in await asyncio.gather(*sending)] == [200] * 5
        for _ in range(3):
            await asyncio.gather(*(client.post("sk-a") for _ in range(20)))
    assert len(engine.bodies) == 20


async def test_a_client_that_goes_away_frees_its_place(folder: Path) -> None:
    engine = Held()
    async with gateway(LIMITS % "concurrentRequests: 1", engine, base=folder) as client:
        leaving = asyncio.create_task(client.post("sk-a"))
        await eventually(lambda: bool(engine.bodies))
        assert (await client.post("sk-a")).status == 429
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        engine.may_answer.set()

        async def is_free() -> bool:
            return (await client.post("sk-a")).status == 200

        await eventually(is_free)


async def test_large_requests_are_counted_by_what_they_allow_as_well(folder: Path) -> None:
    """Their bodies are read in threads."""
    engine = Held()
    isolated = "isolation: {secretFile: secret}, limits: {outputTokens: 100}"
    (folder / "secret").write_text("0123456789abcdef0123456789abcdef")
    async with gateway(f"access: {{keysFile: keys.yaml, {isolated}}}\n", engine, base=folder) as client:
        message = {"role": "user", "content": "x" * 600_000}
        first = asyncio.create_task(client.post("sk-a", messages=[message], max_tokens=60, cache_salt="mine"))
        await eventually(lambda: bool(engine.bodies))
        assert (await client.post("sk-a", messages=[message], max_tokens=60)).status == 429
        engine.may_answer.set()
        assert (await first).status == 200
    assert engine.bodies[0]["messages"] == [message]
    assert len(engine.bodies[0]["cache_salt"]) == 43
