"""Comments while an engine is silent: none before it has answered with a stream, and none inside an event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from matrixinfer.config import ApiConfig, LimitsConfig
from tests.integration.gateway_support import Rig, nowhere, ok, pod, rig
from tests.waiting import DEADLINE_SECONDS

COMMENT = b": keep-alive\n\n"
EVENT = b"data: 1\n\n"
FRONT = ApiConfig(sse_keep_alive_seconds=0.05)


class Silent:
    """Sends these pieces, and is silent before each until it is told to go on."""

    def __init__(self, *pieces: bytes, kind: str = "text/event-stream") -> None:
        self.pieces = pieces
        self.kind = kind
        self.go_on = asyncio.Semaphore(0)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": self.kind})
        await response.prepare(request)
        for piece in self.pieces:
            await self.go_on.acquire()
            await response.write(piece)
        return response


@asynccontextmanager
async def asked(*engines: Silent | str, limits: LimitsConfig | None = None) -> AsyncIterator[tuple[Rig, Reader]]:
    first, *others = engines
    assert isinstance(first, Silent)
    async with (
        pod(first) as url,
        rig(url, *map(str, others), front=FRONT, limits=limits) as gateway,
        gateway.post() as response,
    ):
        yield gateway, Reader(response)


class Reader:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.read = b""

    async def until(self, holds: Callable[[bytes], bool]) -> bytes:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not holds(self.read):
                chunk = await self.response.content.readany()
                assert chunk
                self.read += chunk
        return self.read

    async def rest(self) -> bytes:
        self.read += await self.response.content.read()
        return self.read


async def test_a_stream_that_is_silent_before_and_between_its_events_gets_comments() -> None:
    engine = Silent(EVENT, EVENT)
    async with asked(engine) as (gateway, reader):
        assert reader.response.status == 200
        assert await reader.until(lambda read: read.count(COMMENT) >= 2) == COMMENT * reader.read.count(COMMENT)
        assert "first_byte" not in gateway.router.reports
        engine.go_on.release()
        await reader.until(lambda read: read.endswith(EVENT + COMMENT))
        assert gateway.router.reports.count("first_byte") == 1
        engine.go_on.release()
        assert (await reader.rest()).replace(COMMENT, b"") == EVENT * 2


async def test_no_comment_splits_an_event() -> None:
    engine = Silent(EVENT[:4], EVENT[4:])
    engine.go_on.release()
    async with asked(engine) as (_, reader):
        await reader.until(lambda read: read.endswith(EVENT[:4]))
        await asyncio.sleep(0.3)  # nothing may come
        engine.go_on.release()
        assert (await reader.rest()).replace(COMMENT, b"") == EVENT


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
async def test_an_answer_that_is_no_stream_of_events_gets_none(kind: str) -> None:
    engine = Silent(b"a", b"b", kind=kind)
    engine.go_on.release()
    async with asked(engine) as (_, reader):
        await reader.until(lambda read: read == b"a")
        await asyncio.sleep(0.2)  # nothing may come
        engine.go_on.release()
        assert await reader.rest() == b"ab"


async def test_no_head_is_made_up_while_an_engine_has_not_answered() -> None:
    async def refuses_late(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        await asyncio.sleep(0.2)
        return web.Response(status=503)

    async with (
        pod(refuses_late) as first,
        pod(ok) as second,
        rig(first, second, front=FRONT) as gateway,
        gateway.post() as response,
    ):
        assert (response.status, response.headers["x-matrixinfer-pod"]) == (200, "b")


async def test_an_engine_that_never_sends_its_first_byte_is_given_up_in_time_all_the_same() -> None:
    limits = LimitsConfig(first_byte_timeout_seconds=0.5)
    async with asked(Silent(EVENT), nowhere(), limits=limits) as (gateway, reader):
        with pytest.raises(aiohttp.ClientPayloadError):
            await reader.rest()
        assert reader.read == COMMENT * reader.read.count(COMMENT)
        assert gateway.router.reports[-2:] == ["broke a", "closed"]
        assert gateway.sample("upstream_errors_total", pod="a", kind="timeout") == 1
