"""Pods that cannot be reached, break off, or fall silent."""

from __future__ import annotations

import asyncio
import socket
import struct

import aiohttp
import pytest
from aiohttp import web

from matrixinfer.config import LimitsConfig, PodWatchConfig
from tests.integration.gateway_support import (
    BODY,
    CHAT,
    FOREVER,
    LOOPBACK,
    Rig,
    nowhere,
    ok,
    pod,
    raw_pod,
    read_request,
    rig,
)
from tests.ports import free_port
from tests.waiting import DEADLINE_SECONDS

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def refuse_to_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    reset(writer)


async def close_without_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)


async def answer_with_noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"\x00\x01 what?\r\n\r\n")
    await writer.drain()


async def stop_after_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(CHUNKED)
    await writer.drain()


async def stop_in_a_whole_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(ANSWER[:-1])
    await writer.drain()


async def body_and_pod(gateway: Rig) -> tuple[int, bytes, str | None]:
    async with gateway.post() as response:
        return response.status, await response.read(), response.headers.get("x-matrixinfer-pod")


async def test_a_refused_connection_goes_to_the_next_ranked_pod() -> None:
    async with pod(ok) as url, rig(nowhere(), url) as gateway:
        assert await body_and_pod(gateway) == (200, b'{"ok":true}', "b")
        assert gateway.router.reports == ["failed a", "move b", "answered b", "first_byte", "closed"]
        assert gateway.sample("upstream_errors_total", pod="a", kind="connect") == 1
        assert gateway.sample("retries_total", reason="connect") == 1
        assert gateway.sample("in_flight", pod="a") == 0


async def test_a_pod_that_a_filter_removed_is_tried_last() -> None:
    async with pod(ok) as url, rig(url, nowhere()) as gateway:
        gateway.router.removed = {"a"}
        assert await body_and_pod(gateway) == (200, b'{"ok":true}', "a")
        assert gateway.router.reports[:2] == ["failed b", "move a"]


async def test_a_server_error_is_passed_on_but_does_not_count_as_a_sign_of_health() -> None:
    async def fail(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return web.Response(status=500)

    async with pod(fail) as url, rig(url) as gateway:
        assert await body_and_pod(gateway) == (500, b"", "a")
        assert gateway.router.reports == ["closed"]


async def test_an_address_that_is_no_url_is_not_held_against_the_pod() -> None:
    async with rig("http://") as gateway:
        assert (await body_and_pod(gateway))[0] == 500
        assert gateway.router.reports == ["closed"]
        assert gateway.sample("requests_total", model="tiny", code="500") == 1


@pytest.mark.parametrize(
    "talk", [refuse_to_answer, close_without_answer, answer_with_noise, stop_after_headers, stop_in_a_whole_answer]
)
async def test_a_connection_that_breaks_before_the_first_byte_goes_to_the_next_ranked_pod(talk) -> None:  # type: ignore[no-untyped-def]
    async with raw_pod(talk) as broken, pod(ok) as url, rig(broken, url) as gateway:
        assert await body_and_pod(gateway) == (200, b'{"ok":true}', "b")
        assert [report for report in gateway.router.reports if not report.startswith("answered")] == [
            "failed a",
            "move b",
            "first_byte",
            "closed",
        ]


async def test_a_connection_that_is_not_accepted_in_time_goes_to_the_next_ranked_pod() -> None:
    # A listener whose backlog is full drops further attempts, which then time out.
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind((LOOPBACK, 0))
        full.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        await asyncio.sleep(0.05)
        deaf = f"http://{LOOPBACK}:{full.getsockname()[1]}"
        limits = LimitsConfig(connect_timeout_seconds=1.0)
        async with pod(ok) as url, rig(deaf, url, limits=limits) as gateway:
            assert await body_and_pod(gateway) == (200, b'{"ok":true}', "b")
            assert gateway.sample("retries_total", reason="connect_timeout") == 1


async def test_the_same_bytes_go_to_every_pod_that_is_tried() -> None:
    seen: list[bytes] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await read_request(reader)).partition(b"\r\n\r\n")[2])

    async with raw_pod(swallow) as a, raw_pod(swallow) as b, rig(a, b) as gateway:
        await body_and_pod(gateway)
    assert seen
    assert set(seen) == {BODY}


async def test_no_more_pods_are_tried_than_allowed_and_the_client_gets_an_error() -> None:
    tried: list[str] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        tried.append("c")
        return await ok(request)

    limits = LimitsConfig(max_attempts=2)
    async with pod(handle) as url, rig(nowhere(), nowhere(), url, limits=limits) as gateway:
        async with gateway.post() as response:
            assert response.status == 502
            error = (await response.json())["error"]
        assert error["type"] == "server_error"
        assert error["code"] == "pod_unreachable"
        assert "a, b" in error["message"]
        assert tried == []
        assert gateway.router.reports[-1] == "closed"
        assert gateway.sample("requests_total", model="tiny", code="502") == 1


async def test_a_stream_that_breaks_off_is_cut_for_the_client_and_never_retried() -> None:
    others: list[str] = []

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED + b"5\r\nfirst\r\n")
        await writer.drain()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        others.append("b")
        return await ok(request)

    async with raw_pod(break_off) as broken, pod(handle) as url, rig(broken, url) as gateway:
        async with gateway.post() as response:
            assert response.status == 200
            assert await response.content.readany() == b"first"
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.readany()
        assert others == []
        assert gateway.router.reports == ["answered a", "first_byte", "broke a", "closed"]
        assert gateway.sample("upstream_errors_total", pod="a", kind="broken") == 1
        assert gateway.sample("requests_total", model="tiny", code="502") == 1


async def test_a_stream_that_breaks_off_does_not_look_whole_to_a_client_of_http_1_0() -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED + b"5\r\nfirst\r\n")
        await writer.drain()
        await asyncio.sleep(0.1)

    async with raw_pod(break_off) as broken, rig(broken) as gateway:
        reader, writer = await asyncio.open_connection(LOOPBACK, int(gateway.url.rsplit(":", 1)[1]))
        writer.write(b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(BODY), BODY))
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), DEADLINE_SECONDS)
        writer.close()


async def test_a_pod_that_is_silent_before_the_first_byte_is_a_504_and_not_retried() -> None:
    others: list[str] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(FOREVER)
        return web.Response()

    async def other(request: web.BaseRequest) -> web.StreamResponse:
        others.append("b")
        return web.Response()

    limits = LimitsConfig(first_byte_timeout_seconds=1.0)
    async with pod(handle) as url, pod(other) as second, rig(url, second, limits=limits) as gateway:
        async with gateway.post() as response:
            assert response.status == 504
            assert (await response.json())["error"]["code"] == "pod_timeout"
        assert others == []
        assert gateway.router.reports == ["failed a", "closed"]
        assert gateway.sample("upstream_errors_total", pod="a", kind="timeout") == 1


async def test_a_pod_that_is_silent_after_its_headers_is_a_504_too() -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(FOREVER)
        return response

    limits = LimitsConfig(first_byte_timeout_seconds=1.0)
    async with pod(handle) as url, rig(url, limits=limits) as gateway, gateway.post() as response:
        assert response.status == 504


async def test_a_stream_that_falls_silent_is_cut_for_the_client() -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        await asyncio.sleep(FOREVER)
        return response

    limits = LimitsConfig(idle_timeout_seconds=1.0)
    async with pod(handle) as url, rig(url, limits=limits) as gateway, gateway.post() as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
        assert gateway.sample("upstream_errors_total", pod="a", kind="timeout") == 1


async def test_a_kept_connection_that_the_pod_closed_is_replaced_without_blame() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(ANSWER)
        await writer.drain()
        if connections == 1:
            await read_request(reader)  # and close instead of answering: what a server's idle time-out looks like
        else:
            await asyncio.sleep(FOREVER)

    watch = PodWatchConfig(unhealthy_after_failures=1)
    async with raw_pod(talk) as url, pod(ok) as other, rig(url, other, watch=watch) as gateway:
        assert await body_and_pod(gateway) == (200, b"ok", "a")
        assert await body_and_pod(gateway) == (200, b"ok", "a")
        assert connections == 2
        assert gateway.router.reports == ["answered a", "first_byte", "closed"]
        assert gateway.router.registry.pods[0].healthy
        assert gateway.sample("retries_total", reason="stale_connection") == 1


async def test_a_pod_that_comes_back_is_used_again() -> None:
    watch = PodWatchConfig(unhealthy_after_failures=1)
    async with pod(ok) as other:
        port = free_port()
        url = f"http://{LOOPBACK}:{port}"
        async with rig(url, other, watch=watch) as gateway:
            assert (await body_and_pod(gateway))[2] == "b"
            assert [p.name for p in gateway.router.registry.resolve("tiny")[1]] == ["b"]
            async with pod(ok, port):
                gateway.router.registry.answered("a")  # as the watcher reports
                assert (await body_and_pod(gateway))[2] == "a"
