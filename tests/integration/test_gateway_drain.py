"""Requests that come just when the gateway stops to listen: what has connected is answered."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from matrixinfer.config import DrainConfig
from tests.integration.gateway_support import BODY, CHAT, Rig, ok, pod, rig

REQUEST = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(BODY), BODY)


def connect(gateway: Rig) -> socket.socket:
    """A connection that the system has made; the gateway's loop has not run since."""
    address = urlsplit(gateway.url)
    made = socket.create_connection((address.hostname, address.port))
    made.setblocking(False)
    return made


async def answer(connection: socket.socket) -> bytes:
    loop, received = asyncio.get_running_loop(), b""
    while data := await loop.sock_recv(connection, 65_536):
        received += data
    connection.close()
    return received


async def test_connections_that_wait_to_be_accepted_are_answered() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        connections = [connect(gateway) for _ in range(20)]
        for connection in connections:
            connection.send(REQUEST)
        drain = asyncio.create_task(gateway.gateway.drain())
        answers = await asyncio.gather(*map(answer, connections))
        await drain
    assert all(each.startswith(b"HTTP/1.1 200 ") for each in answers)
    assert all(b"\r\nConnection: close\r\n" in each for each in answers)


async def test_a_new_connection_has_a_moment_to_send_its_request() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        connection = connect(gateway)
        await asyncio.sleep(0.05)
        drain = asyncio.create_task(gateway.gateway.drain())
        await asyncio.sleep(0.1)
        connection.send(REQUEST)
        assert (await answer(connection)).startswith(b"HTTP/1.1 200 ")
        await drain


async def test_a_connection_that_stays_unused_delays_the_end_no_longer_than_that() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        connection = connect(gateway)
        await asyncio.sleep(0.05)
        async with asyncio.timeout(3.0):
            await gateway.gateway.drain()
        assert await answer(connection) == b""


@pytest.mark.parametrize("seconds", [0.0, 0.3])
async def test_a_request_that_begins_while_others_end_is_not_cut_off_with_them(seconds: float) -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return await ok(request)

    async with pod(handle) as url, rig(url, drain=DrainConfig(timeout_seconds=10.0)) as gateway:
        first, second = connect(gateway), connect(gateway)
        first.send(REQUEST)
        await asyncio.sleep(0.2)
        drain = asyncio.create_task(gateway.gateway.drain())
        await asyncio.sleep(seconds)
        second.send(REQUEST)
        for connection in (first, second):
            assert (await answer(connection)).startswith(b"HTTP/1.1 200 ")
        await drain
