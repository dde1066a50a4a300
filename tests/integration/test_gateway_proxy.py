"""Forwarding: what passes through, when, and what the client's leaving does."""

from __future__ import annotations

import asyncio
import io
import re

import aiohttp
import pytest
from aiohttp import web

from matrixinfer.config import LimitsConfig
from matrixinfer.gateway.upstream import MAX_WHOLE_BYTES
from tests.integration.gateway_support import BODY, CHAT, FOREVER, LOOPBACK, ok, pod, rig
from tests.waiting import DEADLINE_SECONDS, eventually


async def test_bodies_pass_byte_for_byte_in_both_directions() -> None:
    answer = bytes(range(256)) * 300
    seen: list[tuple[str, bytes]] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.append((request.raw_path, await request.read()))
        return web.Response(body=answer, headers={"Content-Type": "application/x-odd", "X-Engine": "v"})

    async with pod(handle) as url, rig(url) as gateway:
        async with gateway.post(path="/v1/completions?beta=a%20b") as response:
            assert await response.read() == answer
            assert response.headers["Content-Type"] == "application/x-odd"
            assert response.headers["X-Engine"] == "v"
            assert response.headers["x-matrixinfer-pod"] == "a"
        assert seen == [("/v1/completions?beta=a%20b", BODY)]
        assert gateway.router.reports == ["answered a", "first_byte", "closed"]
        assert gateway.sample("requests_total", model="tiny", code="200") == 1
        assert gateway.sample("in_flight", pod="a") == 0


async def test_an_absolute_request_target_reaches_the_pod_as_a_path_and_costs_it_nothing() -> None:
    seen: list[str] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.raw_path)
        return await ok(request)

    async with pod(handle) as url, rig(url) as gateway:
        reader, writer = await asyncio.open_connection(LOOPBACK, int(gateway.url.rpartition(":")[2]))
        head = f"POST http://elsewhere{CHAT}?a=%20b HTTP/1.1\r\nHost: elsewhere\r\nContent-Length: {len(BODY)}\r\n\r\n"
        writer.write(head.encode() + BODY)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), DEADLINE_SECONDS)
        writer.close()
        assert seen == [f"{CHAT}?a=%20b"]
        assert gateway.router.reports == ["answered a", "first_byte", "closed"]


async def test_a_long_answer_with_a_declared_length_streams_and_keeps_its_length() -> None:
    answer = b"x" * (MAX_WHOLE_BYTES + 5)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=answer)

    async with pod(handle) as url, rig(url) as gateway, gateway.post() as response:
        assert response.headers["Content-Length"] == str(len(answer))
        assert await response.read() == answer


async def test_a_large_request_body_reaches_the_pod_whole() -> None:
    body = BODY[:-1] + b', "pad": "' + b"y" * 5_000_000 + b'"}'

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        size = 0
        while chunk := await request.content.readany():
            size += len(chunk)
        return web.Response(body=str(size).encode())

    async with pod(handle) as url, rig(url) as gateway, gateway.post(io.BytesIO(body)) as response:
        assert await response.read() == str(len(body)).encode()


async def test_each_chunk_reaches_the_client_before_the_next_is_produced() -> None:
    proceed = asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(3):
            await response.write(b"data: %d\n\n" % number)
            await proceed.wait()
            proceed.clear()
        return response

    async with pod(handle) as url, rig(url) as gateway, gateway.post() as response:
        for number in range(3):
            chunk = await asyncio.wait_for(response.content.readany(), DEADLINE_SECONDS)
            assert chunk == b"data: %d\n\n" % number
            proceed.set()
        assert await response.content.readany() == b""


async def test_headers_go_out_with_the_first_byte_and_until_then_no_prefill_is_reported() -> None:
    headers_sent, proceed = asyncio.Event(), asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        headers_sent.set()
        await proceed.wait()
        await response.write(b"token")
        return response

    async with pod(handle) as url, rig(url) as gateway:
        request = asyncio.create_task(gateway.client.post(gateway.url + CHAT, data=BODY))
        await headers_sent.wait()
        await eventually(lambda: gateway.router.reports == ["answered a"])
        proceed.set()
        async with await request as response:
            assert await response.read() == b"token"
        assert gateway.router.reports == ["answered a", "first_byte", "closed"]


@pytest.mark.parametrize("stage", ["headers", "first byte", "stream"])
async def test_a_client_that_leaves_ends_the_work_at_the_pod(stage: str) -> None:
    reached, cancelled = asyncio.Event(), asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        try:
            if stage != "headers":
                await response.prepare(request)
            if stage == "stream":
                await response.write(b"first")
            reached.set()
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return response

    async with pod(handle) as url, rig(url) as gateway:
        request = asyncio.create_task(gateway.client.post(gateway.url + CHAT, data=BODY))
        await reached.wait()
        if stage == "stream":
            response = await request
            assert await response.content.readany() == b"first"
            response.close()
        else:
            request.cancel()
        await asyncio.wait_for(cancelled.wait(), DEADLINE_SECONDS)
        await eventually(lambda: gateway.router.reports[-1:] == ["closed"])
        await eventually(lambda: gateway.sample("requests_total", model="tiny", code="499") == 1)
        assert gateway.sample("in_flight", pod="a") == 0
        assert not any(report.startswith("failed") for report in gateway.router.reports)


async def test_a_client_that_stops_reading_is_cut_off_in_the_end_and_frees_the_pod() -> None:
    cancelled = asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"z" * 65536)
        except (ConnectionError, asyncio.CancelledError):
            cancelled.set()
            raise

    limits = LimitsConfig(idle_timeout_seconds=1.0)
    async with pod(handle) as url, rig(url, limits=limits) as gateway:
        _, writer = await asyncio.open_connection(LOOPBACK, int(gateway.url.rsplit(":", 1)[1]), limit=1024)
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(BODY), BODY))
        await asyncio.wait_for(cancelled.wait(), DEADLINE_SECONDS)
        await eventually(lambda: gateway.router.reports[-1] == "closed")
        writer.close()


async def test_hundreds_of_streams_run_at_once() -> None:
    count, running, proceed = 250, 0, asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal running
        running += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"a")
        await proceed.wait()
        await response.write(b"b")
        return response

    async def one() -> bytes:
        async with gateway.post() as response:
            return bytes(await response.read())

    async with pod(handle) as url, rig(url) as gateway:
        tasks = [asyncio.create_task(one()) for _ in range(count)]
        await eventually(lambda: running == count)
        assert gateway.sample("in_flight", pod="a") == count
        proceed.set()
        assert await asyncio.gather(*tasks) == [b"ab"] * count


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_an_error_of_the_pod_is_the_client_s_to_see(status: int) -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, reason="Odd", body=b'{"object":"error"}', headers={"Retry-After": "7"})

    async with pod(handle) as url, rig(url) as gateway, gateway.post() as response:
        assert (response.status, response.reason) == (status, "Odd")
        assert await response.read() == b'{"object":"error"}'
        assert response.headers["Retry-After"] == "7"
        assert gateway.sample("requests_total", model="tiny", code=str(status)) == 1


async def test_headers_of_one_connection_stay_there_and_no_others_are_added() -> None:
    seen: dict[str, str] = {}

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.update(request.headers)
        headers = {"Connection": "X-Private", "X-Private": "1", "Keep-Alive": "timeout=5", "X-Kept": "1"}
        return web.Response(body=b"ok", headers=headers)

    async with pod(handle) as url, rig(url) as gateway:
        sent = {
            "Connection": "keep-alive, X-Drop",
            "X-Drop": "1",
            "TE": "trailers",
            "Proxy-Authorization": "secret",
            "Authorization": "Bearer key",
            "Cookie": "a=b",
            "X-Request-Id": "mine-1",
        }
        skipped = ["User-Agent", "Accept", "Accept-Encoding"]
        async with gateway.post(headers=sent, skip_auto_headers=skipped) as response:
            received = response.headers
        assert {name.lower(): value for name, value in seen.items()} == {
            "authorization": "Bearer key",
            "content-length": str(len(BODY)),
            "content-type": "application/json",
            "cookie": "a=b",
            "host": url.removeprefix("http://"),
            "x-request-id": "mine-1",
        }
        assert "X-Private" not in received
        assert "Keep-Alive" not in received
        assert received["X-Kept"] == "1"
        assert received["x-request-id"] == "mine-1"


async def test_cookies_of_one_client_never_reach_another() -> None:
    cookies: list[str | None] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        cookies.append(request.headers.get("Cookie"))
        return web.Response(body=b"ok", headers={"Set-Cookie": "who=me"})

    # Cookie jars keep nothing for bare addresses, so the pod needs a name.
    async with pod(handle) as url, rig(url.replace(LOOPBACK, "localhost")) as gateway:
        for _ in range(2):
            async with aiohttp.ClientSession() as client, client.post(gateway.url + CHAT, data=BODY) as response:
                assert response.headers["Set-Cookie"] == "who=me"
    assert cookies == [None, None]


@pytest.mark.parametrize("given", ["", "x" * 129, "sp ace", "ünicode"])
async def test_an_unfit_request_id_is_replaced(given: str) -> None:
    async with pod(ok) as url, rig(url) as gateway, gateway.post(headers={"x-request-id": given}) as response:
        assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


async def test_the_session_of_the_client_reaches_the_router() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        async with gateway.post(headers={"X-Session-ID": "s1"}):
            pass
        async with gateway.post():
            pass
        assert gateway.router.sessions == ["s1", None]


async def test_a_compressed_answer_passes_as_it_is() -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"\x1f\x8bnot really", headers={"Content-Encoding": "gzip"})

    async with pod(handle) as url, rig(url) as gateway, gateway.post() as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert await response.read() == b"\x1f\x8bnot really"


async def test_a_client_that_asks_before_sending_its_body_is_invited_at_once() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        reader, writer = await asyncio.open_connection(LOOPBACK, int(gateway.url.rsplit(":", 1)[1]))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\nExpect: 100-continue\r\n\r\n"
        writer.write(head.encode())
        invitation = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_SECONDS)
        assert b" 100 " in invitation
        writer.write(BODY)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), DEADLINE_SECONDS)
        writer.close()


@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n"])
async def test_a_client_of_http_1_0_gets_its_answer_unchunked_up_to_the_end_of_the_connection(more: bytes) -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one ")
        await response.write(b"two")
        return response

    async with pod(handle) as url, rig(url) as gateway:
        reader, writer = await asyncio.open_connection(LOOPBACK, int(gateway.url.rsplit(":", 1)[1]))
        writer.write(b"POST %b HTTP/1.0\r\n%bContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), more, len(BODY), BODY))
        answer = await asyncio.wait_for(reader.read(), DEADLINE_SECONDS)
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"one two"
    assert b"chunked" not in head
