"""Waiting for a turn, as clients meet it."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.integration.access_support import MESSAGES, Client, Engine, gateway, key_file
from tests.waiting import eventually

ONE = "admission: {maxConcurrentRequests: 1, queueSize: %d, queueTimeoutSeconds: %g}\n"


class Held(Engine):
    """Answers each request once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = asyncio.Semaphore(0)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await self.may_answer.acquire()
        return await super().answer(request)


async def waiting(client: Client) -> float:
    return await client.metric('matrixinfer_admission_requests{state="waiting"}')


async def test_requests_wait_for_their_turn_and_reach_the_engine_one_by_one(tmp_path: Path) -> None:
    engine = Held()
    async with gateway(ONE % (10, 600), engine, base=tmp_path) as client:
        sending = [asyncio.create_task(client.post()) for _ in range(5)]

        async def are_waiting() -> bool:
            return await waiting(client) == 4

        await eventually(are_waiting)
        for count in range(1, 6):
            await eventually(lambda count=count: len(engine.bodies) == count)  # type: ignore[misc]
            engine.may_answer.release()
        assert [answer.status for answer in await asyncio.gather(*sending)] == [200] * 5
        assert await client.metric("matrixinfer_admission_wait_seconds_count") == 5


async def test_too_many_are_answered_with_503_in_the_words_of_the_api(tmp_path: Path) -> None:
    engine = Held()
    async with gateway(ONE % (0, 600), engine, base=tmp_path) as client:
        first = asyncio.create_task(client.post())
        await eventually(lambda: len(engine.bodies) == 1)
        refused = await client.post()
        assert (refused.status, refused.body["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["Retry-After"]) >= 1
        refused = await client.post(path=MESSAGES)
        assert (refused.status, refused.body["error"]["type"]) == (503, "overloaded_error")
        engine.may_answer.release()
        assert (await first).status == 200
        engine.may_answer.release()
        assert (await client.post()).status == 200


async def test_the_access_log_says_who_sent_a_request_and_how_long_it_waited(tmp_path: Path) -> None:
    key_file(tmp_path, [{"name": "a", "key": "sk-a", "tenant": "lab"}])
    file, engine = tmp_path / "access.jsonl", Held()
    config = f"access: {{keysFile: keys.yaml}}\naccessLog: {{path: '{file}'}}\n"
    async with gateway(config + ONE % (10, 600), engine, base=tmp_path) as client:
        sending = [asyncio.create_task(client.post("sk-a")) for _ in range(2)]
        await eventually(lambda: len(engine.bodies) == 1)
        for _ in range(2):
            engine.may_answer.release()
        await asyncio.gather(*sending)
        await client.post("sk-mallory")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line.get("tenant"), line.get("caller"), line.get("error")) for line in lines] == [
        ("lab", "a", None),
        ("lab", "a", None),
        (None, None, "invalid_api_key"),
    ]
    assert ["queue" in line["ms"] for line in lines] == [False, True, False]
    assert "sk-" not in file.read_text()


async def test_who_waits_too_long_is_told_and_its_limit_given_back(tmp_path: Path) -> None:
    key_file(tmp_path, [{"name": "a", "key": "sk-a"}])
    engine = Held()
    limits = "access: {keysFile: keys.yaml, limits: {requests: 2, windowSeconds: 3600}}\n"
    async with gateway(limits + ONE % (10, 0.05), engine, base=tmp_path) as client:
        first = asyncio.create_task(client.post("sk-a"))
        await eventually(lambda: len(engine.bodies) == 1)
        assert (await client.post("sk-a")).status == 503
        engine.may_answer.release()
        engine.may_answer.release()
        assert (await first).status == 200
        assert (await client.post("sk-a")).status == 200
        assert (await client.post("sk-a")).status == 429


async def test_a_pod_that_went_while_a_request_waited_does_not_get_it(tmp_path: Path) -> None:
    engines = [Held(), Held()]
    async with gateway(ONE % (10, 600), *engines, base=tmp_path) as client:
        first = asyncio.create_task(client.post())
        await eventually(lambda: any(engine.bodies for engine in engines))
        busy = next(engine for engine in engines if engine.bodies)
        second = asyncio.create_task(client.post())

        async def is_waiting() -> bool:
            return await waiting(client) == 1

        await eventually(is_waiting)
        other = "ab"[1 - engines.index(busy)]
        client.service.leave(other)
        busy.may_answer.release()
        busy.may_answer.release()
        assert (await first).status == 200
        answer = await second
        assert (answer.status, answer.headers["x-matrixinfer-pod"]) == (200, "ab"[engines.index(busy)])


@pytest.mark.parametrize("leaves", ["running", "waiting"])
async def test_clients_that_go_away_leave_no_place_taken(tmp_path: Path, leaves: str) -> None:
    engine = Held()
    async with gateway(ONE % (10, 600), engine, base=tmp_path) as client:
        running = asyncio.create_task(client.post())
        await eventually(lambda: len(engine.bodies) == 1)
        queued = asyncio.create_task(client.post())

        async def is_waiting() -> bool:
            return await waiting(client) == 1

        await eventually(is_waiting)
        (running if leaves == "running" else queued).cancel()
        await asyncio.gather(running if leaves == "running" else queued, return_exceptions=True)
        for _ in range(3):
            engine.may_answer.release()
        assert (await (queued if leaves == "running" else running)).status == 200
        assert (await client.post()).status == 200

        async def is_empty() -> bool:
            running = await client.metric('matrixinfer_admission_requests{state="running"}')
            return (running, await waiting(client)) == (0, 0)

        await eventually(is_empty)


class Erratic(Engine):
    """Answers, refuses, fails, breaks off or is slow, as it likes."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.is_calm = False

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        how = "ok" if self.is_calm else self.rng.choice(("ok", "status", "cut", "broken", "slow"))
        if how == "status":
            return web.Response(status=self.rng.choice((400, 404, 429, 500, 503)))
        if how == "cut" and request.transport is not None:
            request.transport.abort()
        if how == "slow":
            await asyncio.sleep(self.rng.uniform(0.0, 0.2))
        if how == "broken":
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: x\n\n")
            await asyncio.sleep(self.rng.uniform(0.0, 0.05))
            if request.transport is not None:
                request.transport.abort()
        return await super().answer(request)


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_stays_taken_whatever_engines_and_clients_do(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    key_file(tmp_path, [{"name": name, "key": f"sk-{name}"} for name in "xyz"])
    config = """
access: {keysFile: keys.yaml, limits: {concurrentRequests: 8, inputTokens: 1000000000}}
admission: {maxConcurrentRequests: 4, queueSize: 10, queueTimeoutSeconds: 0.3}
outliers: {maxEjectedShare: 0}
"""
    engines = [Erratic(rng), Erratic(rng)]
    async with gateway(config, *engines, base=tmp_path) as client:

        async def one() -> None:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(rng.choice((0.02, 0.1, 30.0))):
                    await client.post(f"sk-{rng.choice('xyz')}", stream=rng.random() < 0.5)

        async with asyncio.TaskGroup() as group:
            for _ in range(300):
                group.create_task(one())
                await asyncio.sleep(rng.uniform(0.0, 0.01))
        for engine in engines:
            engine.is_calm = True

        async def is_empty() -> bool:
            running = await client.metric('matrixinfer_admission_requests{state="running"}')
            return (running, await waiting(client)) == (0, 0)

        await eventually(is_empty)
        for name in "xyz":  # each may have as many as ever
            answers = await asyncio.gather(*(client.post(f"sk-{name}") for _ in range(8)))
            assert {answer.status for answer in answers} <= {200, 503}
            assert (await client.post(f"sk-{name}")).status == 200
