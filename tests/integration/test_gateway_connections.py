"""What a client's connection may cost, and what it gets when it does something odd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from matrixinfer.config import ConnectionsConfig
from tests.integration.gateway_support import BODY, CHAT, FOREVER, LOOPBACK, Rig, ok, pod, rig
from tests.waiting import DEADLINE_SECONDS, eventually

REQUEST = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(BODY), BODY)


@asynccontextmanager
async def connected(gateway: Rig) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(LOOPBACK, int(gateway.url.rsplit(":", 1)[1]))
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            yield reader, writer
    finally:
        writer.close()


async def test_a_head_that_does_not_end_is_refused_by_its_size() -> None:
    async with rig() as gateway, connected(gateway) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for number in range(20):
            writer.write(b"x-%d: %s\r\n" % (number, b"y" * 4_000))
            await asyncio.sleep(0)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b'"type":"invalid_request_error"' in answer


async def test_a_head_that_does_not_come_is_refused_by_its_time() -> None:
    connections = ConnectionsConfig(head_timeout_seconds=0.1)
    async with rig(connections=connections) as gateway, connected(gateway) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")


async def test_a_refused_client_that_sends_on_is_not_answered_twice() -> None:
    connections = ConnectionsConfig(head_timeout_seconds=0.05)
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    async with rig(connections=connections) as gateway, connected(gateway) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\n")
        answer = await reader.read()
        for _ in range(4):
            writer.write(b"x-more: 1\r\n")
            await asyncio.sleep(0.05)
        writer.write(b"\r\n")
        await asyncio.sleep(0.1)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert faults == []


async def test_a_slow_body_is_not_taken_for_a_slow_head() -> None:
    connections = ConnectionsConfig(head_timeout_seconds=0.1)
    async with pod(ok) as url, rig(url, connections=connections) as gateway, connected(gateway) as (reader, writer):
        head, body = REQUEST[: -len(BODY)], REQUEST[-len(BODY) :]
        writer.write(head)
        for byte in (body[:10], body[10:20], body[20:]):
            await asyncio.sleep(0.1)
            writer.write(byte)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")


async def test_pipelined_requests_are_counted_apart() -> None:
    async with rig() as gateway, connected(gateway) as (reader, writer):
        pad = b"x-pad: %s\r\n" % (b"y" * 4_000) * 10
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n" + pad + b"\r\n")
        for _ in range(3):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await reader.readexactly(len(b'{"status":"ok"}'))


async def test_connections_beyond_the_limit_are_refused_and_others_go_on() -> None:
    async with rig(max_connections=2) as gateway:
        async with connected(gateway) as (reader, writer), connected(gateway) as (second, other):
            async with connected(gateway) as (refused, _):
                answer = await refused.read()
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"Retry-After: 1\r\n" in answer
            for stream, sink in ((reader, writer), (second, other)):
                sink.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await stream.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.05)
        async with connected(gateway) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")


async def test_a_client_that_closes_its_sending_side_gets_its_answer() -> None:
    proceed, arrived = asyncio.Event(), asyncio.Event()

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        arrived.set()
        await proceed.wait()
        return await ok(request)

    async with pod(slow) as url, rig(url) as gateway, connected(gateway) as (reader, writer):
        writer.write(REQUEST)
        writer.write_eof()
        await arrived.wait()
        await asyncio.sleep(0.2)
        proceed.set()
        answer = await reader.read()
        interim, _, rest = answer.rpartition(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert interim.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"") == b""
        assert rest.startswith(b"HTTP/1.1 200 ")
        assert rest.endswith(b'{"ok":true}')


async def test_a_client_that_has_gone_is_noticed_before_the_first_byte() -> None:
    arrived, cancelled = asyncio.Event(), asyncio.Event()

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        arrived.set()
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return web.Response()

    async with pod(slow) as url, rig(url) as gateway:
        async with connected(gateway) as (_, writer):
            writer.write(REQUEST)
            await arrived.wait()
        await asyncio.wait_for(cancelled.wait(), DEADLINE_SECONDS)
        await eventually(lambda: gateway.sample("requests_total", model="tiny", code="499") == 1)


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /secret FTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nsecret\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_an_error_in_the_shape_of_the_api_and_is_not_quoted(
    noise: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    async with rig() as gateway, connected(gateway) as (reader, writer):
        writer.write(noise)
        answer = await reader.read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert b"aiohttp" not in head
    assert body.startswith(b'{"error":{"message":"The request is not valid HTTP."')
    printed = capsys.readouterr()
    assert "request_malformed" in printed.out + printed.err
    assert "secret" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/messages", 405), ("POST", "/v1/messages/nothing", 404)]
)
async def test_errors_about_paths_have_the_shape_of_their_api(method: str, path: str, status: int) -> None:
    async with rig() as gateway:
        async with gateway.client.request(method, gateway.url + path, headers={"x-request-id": "mine"}) as response:
            error = await response.json()
        assert (response.status, error["type"]) == (status, "error")
        assert response.headers["x-request-id"] == "mine"
        assert response.headers["Server"] == "matrixinfer"
        async with gateway.client.get(gateway.url + "/nothing") as response:
            assert "error" in await response.json()
            assert len(response.headers["x-request-id"]) == 32


async def test_headers_named_by_any_connection_field_stay_on_their_connection() -> None:
    seen: list[str] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.extend(name.lower() for name in request.headers)
        return await ok(request)

    async with pod(handle) as url, rig(url) as gateway, connected(gateway) as (reader, writer):
        fields = b"Connection: x-one\r\nConnection: x-two, close\r\nx-one: 1\r\nx-two: 2\r\nX-Data-Parallel-Rank: 7\r\n"
        writer.write(REQUEST.replace(b"Host: x\r\n", b"Host: x\r\n" + fields))
        await reader.read()
    assert seen
    assert not {"x-one", "x-two", "x-data-parallel-rank"} & set(seen)
