"""The admin listener over all workers: what a new worker is told of what operators have changed."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from matrixinfer.app.workers.front import AdminFront
from matrixinfer.app.workers.process import Answer, WorkerProcess
from matrixinfer.app.workers.worker import Folder, MergedMetrics, Worker
from matrixinfer.config import LimitsConfig
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.listener import Listener
from matrixinfer.prompt.memory import Memory
from matrixinfer.telemetry.intervals import Intervals
from tests.waiting import eventually

Call = Callable[[str, str], Awaitable[None]]


class Told:
    """A worker that agrees to everything about the pod that it is asked about last, and keeps what it was asked."""

    def __init__(self, pod: str) -> None:
        self.pod = pod
        self.asked: list[tuple[str, str]] = []

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        self.asked.append((method, path))
        return Answer(200, json.dumps({"name": self.pod}).encode(), "application/json")


@asynccontextmanager
async def front(worker: Told) -> AsyncIterator[tuple[AdminFront, Call]]:
    async with listening(worker, LimitsConfig()) as (made, at), aiohttp.ClientSession() as client:

        async def call(method: str, path: str) -> None:
            body: Any = {"name": f"{worker.pod}.svc.cluster.local"} if path == "" else None
            url = URL(f"{at}/admin/pods{path}", encoded=True)
            async with client.request(method, url, json=body) as response:
                assert response.status == 200, await response.text()

        yield made, call


@asynccontextmanager
async def listening(worker: Told, limits: LimitsConfig) -> AsyncIterator[tuple[AdminFront, str]]:
    async def reload() -> web.StreamResponse:
        return web.Response()

    bodies = Bodies(limits, Memory(limits.memory_bytes), Intervals(1.0, lambda: 0.0))
    made = AdminFront([cast("WorkerProcess", worker)], asyncio.Event(), bodies, lambda: b"", reload)
    async with Listener("127.0.0.1", 0, made.routes(), asyncio.Event()) as listener:
        yield made, listener.url


async def told(made: AdminFront) -> list[tuple[str, str]]:
    new = Told("")
    await made.catch_up(cast("WorkerProcess", new))
    return new.asked


async def test_a_new_worker_is_told_of_pods_that_are_still_there_however_their_names_were_written() -> None:
    async with front(Told("b")) as (made, call):
        await call("POST", "")
        await call("POST", "/%62/drain?seconds=1")
        assert await told(made) == [("POST", "/admin/pods"), ("POST", "/admin/pods/b/drain")]
        await call("DELETE", "/b/drain")
        assert await told(made) == [("POST", "/admin/pods")]
        await call("POST", "/b/drain")
        await call("DELETE", "/%62")
        assert await told(made) == []


async def test_a_pod_may_have_the_name_of_what_is_done_with_pods() -> None:
    async with front(Told("drain")) as (made, call):
        await call("POST", "")
        await call("DELETE", "/drain")
        assert await told(made) == []


@pytest.mark.parametrize("path", ["/admin/pods", "/debug/route"])
async def test_a_body_that_never_comes_is_not_waited_for(path: str) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    worker, limits = Told("b"), LimitsConfig(body_timeout_seconds=0.1)
    async with (
        listening(worker, limits) as (_, at),
        aiohttp.ClientSession() as client,
        client.post(at + path, data=nothing()) as response,
    ):
        assert response.status == 408, await response.text()
    assert worker.asked == []


async def test_bodies_have_no_more_memory_than_they_may() -> None:
    worker, limits = Told("b"), LimitsConfig(memory_bytes=16 * 1024 * 1024)
    async with (
        listening(worker, limits) as (_, at),
        aiohttp.ClientSession() as client,
        client.post(f"{at}/debug/route", data=BytesIO(bytes(10 * 1024 * 1024))) as response,
    ):
        assert response.status == 413, await response.text()
    assert worker.asked == []


async def test_many_who_ask_for_the_metrics_of_all_workers_ask_the_supervisor_once(tmp_path: Path) -> None:
    asked = 0
    may_answer = asyncio.Event()

    async def metrics(_: web.BaseRequest) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        await may_answer.wait()
        return web.Response(text=f"answers {asked}")

    folder = Folder(path=tmp_path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(str(folder.front))
    merged = MergedMetrics(Worker(number=1, listens=(), alive=0, folder=folder))
    supervisor = Listener("front", 0, {"/metrics": {"GET": metrics}}, asyncio.Event(), bound=bound)
    worker = Listener("127.0.0.1", 0, {"/metrics": {"GET": merged.expose}}, asyncio.Event())
    async with supervisor, worker, aiohttp.ClientSession() as client:

        async def scrape() -> str:
            async with client.get(f"{worker.url}/metrics") as response:
                return await response.text()

        first = asyncio.create_task(scrape())
        await eventually(lambda: asked == 1)
        others = [asyncio.create_task(scrape()) for _ in range(20)]
        gone = asyncio.create_task(scrape())
        await asyncio.sleep(0.1)
        gone.cancel()
        may_answer.set()
        assert await first == "answers 1"
        assert await asyncio.gather(*others) == ["answers 2"] * 20
        assert await scrape() == "answers 3"
