"""Options of the sockets on both sides of the gateway."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop
from aiohttp import web

from matrixinfer.gateway.listener import Listener
from matrixinfer.pods.session import client_session
from tests.integration.gateway_support import LOOPBACK


def no_delay(transport: asyncio.BaseTransport | None) -> bool:
    assert transport is not None
    return bool(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


async def options() -> tuple[bool, bool]:
    """Whether small writes go out at once: to a client of the gateway, and to a pod."""
    accepted, proceed = [], asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        accepted.append(no_delay(request.transport))
        response = web.StreamResponse()
        await response.prepare(request)
        await proceed.wait()
        return response

    async with (
        Listener(LOOPBACK, 0, {"/": {"GET": handle}}, asyncio.Event()) as listener,
        client_session() as session,
        session.get(listener.url) as response,
    ):
        assert response.connection is not None
        upstream = no_delay(response.connection.transport)
        proceed.set()
        await response.read()
    return accepted[0], upstream


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_small_writes_wait_for_nothing_on_either_side(
    run: Callable[[Coroutine[Any, Any, tuple[bool, bool]]], tuple[bool, bool]],
) -> None:
    assert run(options()) == (True, True)


async def answers(host: str, *addresses: str) -> list[int]:
    """The statuses that a listener at a host gives at these addresses."""

    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    async with Listener(host, 0, {"/": {"GET": handle}}, asyncio.Event()) as listener, client_session() as session:
        port, statuses = listener.url.rpartition(":")[2], []
        for address in addresses:
            async with session.get(f"http://{address}:{port}/") as response:
                statuses.append(response.status)
    return statuses


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_the_address_for_all_takes_both_families(run: Callable[[Coroutine[Any, Any, list[int]]], list[int]]) -> None:
    assert run(answers("::", "127.0.0.1", "[::1]")) == [200, 200]
