"""The servers: limits, errors in the API's shape, probes, the admin listener, and stopping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from matrixinfer.config import Config, DrainConfig, LimitsConfig
from matrixinfer.gateway.server import Gateway
from matrixinfer.pods.registry import ServedNames
from tests.integration.gateway_support import BODY, CHAT, FOREVER, LOOPBACK, Rig, ok, pod, rig
from tests.waiting import DEADLINE_SECONDS, eventually


async def error_of(gateway: Rig, body: bytes | AsyncIterator[bytes], path: str = CHAT) -> tuple[int, dict[str, object]]:
    async with gateway.post(body, path) as response:
        assert response.headers["Content-Type"] == "application/json"
        error = (await response.json())["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status, error


async def test_a_body_that_declares_too_much_is_refused_unread() -> None:
    limits = LimitsConfig(max_body_bytes=100)
    async with pod(ok) as url, rig(url, limits=limits) as gateway:
        reader, writer = await asyncio.open_connection(LOOPBACK, int(gateway.url.rsplit(":", 1)[1]))
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 101\r\n\r\n" % CHAT.encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_SECONDS)
        assert b" 413 " in head
        assert b"Connection: close" in head
        writer.close()
        assert gateway.router.dispatched == []
        assert gateway.sample("requests_total", model="unknown", code="413") == 1


async def test_a_body_that_grows_too_large_is_refused_while_it_is_read() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 50
            await asyncio.sleep(0)

    async with pod(ok) as url, rig(url, limits=LimitsConfig(max_body_bytes=100)) as gateway:
        status, error = await error_of(gateway, endless())
        assert (status, error["code"]) == (413, "request_too_large")


async def test_a_body_of_exactly_the_limit_passes() -> None:
    limits = LimitsConfig(max_body_bytes=len(BODY))
    async with pod(ok) as url, rig(url, limits=limits) as gateway, gateway.post() as response:
        assert response.status == 200


@pytest.mark.parametrize("path", [CHAT, "/debug/route"])
async def test_a_body_that_trickles_in_is_given_up(path: str) -> None:
    async with pod(ok) as url, rig(url, limits=LimitsConfig(body_timeout_seconds=0.2)) as gateway:
        base = gateway.url if path == CHAT else gateway.admin_url
        reader, writer = await asyncio.open_connection(LOOPBACK, int(base.rsplit(":", 1)[1]))
        writer.write(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{" % path.encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_SECONDS)
        assert b" 408 " in head
        assert b"connection: close" in head.lower()
        writer.close()


async def test_a_malformed_body_is_a_400() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        status, error = await error_of(gateway, b"{nope")
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", "model")


async def test_a_body_in_broken_chunks_is_given_up() -> None:
    async with pod(ok) as url, rig(url, limits=LimitsConfig(body_timeout_seconds=0.2)) as gateway:
        reader, writer = await asyncio.open_connection(LOOPBACK, int(gateway.url.rsplit(":", 1)[1]))
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode())
        await asyncio.sleep(0.05)
        writer.write(b"zz\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_SECONDS)
        assert head.split()[1] in (b"400", b"408")
        assert gateway.router.dispatched == []
        writer.close()


async def test_an_unknown_model_is_a_404_once_every_pod_has_reported_and_a_503_before() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        status, error = await error_of(gateway, b'{"model":"other"}')
        assert (status, error["code"]) == (503, "no_pod_available")
        served = ServedNames(base_model="tiny", aliases=frozenset({"tiny"}), adapters={})
        gateway.router.registry.learn("a", served=served)
        status, error = await error_of(gateway, b'{"model":"other"}')
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "`other`" in str(error["message"])
        assert gateway.sample("requests_total", model="unknown", code="404") == 1


async def test_no_pod_is_a_503_that_says_when_to_come_back() -> None:
    async with rig() as gateway, gateway.post() as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert len(response.headers["x-request-id"]) == 32


async def test_a_fault_of_ours_is_a_500_that_tells_nothing() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        status, error = await error_of(gateway, b'{"model":"fault"}')
        assert (status, error["type"]) == (500, "server_error")
        assert "secret" not in str(error)
        async with gateway.post() as response:
            assert response.status == 200


async def test_unknown_paths_and_methods_are_reported_in_the_shape_of_the_api() -> None:
    async with rig() as gateway:
        status, error = await error_of(gateway, b"{}", "/v1/nothing")
        assert (status, error["message"]) == (404, "Invalid URL (POST /v1/nothing).")
        async with gateway.client.get(gateway.url + CHAT) as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
        async with gateway.client.get(gateway.url + "/debug/pods") as response:
            assert response.status == 404


async def test_probes_models_and_metrics_answer() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        for base in (gateway.url, gateway.admin_url):
            for path in ("/health", "/ready", "/metrics"):
                async with gateway.client.get(base + path) as response:
                    assert response.status == 200, path
        async with gateway.client.head(gateway.url + "/health") as response:
            assert response.status == 200
        async with gateway.client.get(gateway.url + "/v1/models") as response:
            answer = await response.json()
        assert answer["object"] == "list"
        assert [card["id"] for card in answer["data"]] == ["tiny"]
        async with gateway.post() as response:
            assert response.status == 200
        async with gateway.client.get(gateway.url + "/metrics") as response:
            text = await response.text()
        assert 'matrixinfer_requests_total{code="200",model="tiny"} 1.0' in text
        assert "matrixinfer_time_to_first_byte_seconds_count 1.0" in text


async def test_a_gateway_without_a_healthy_pod_is_alive_but_not_ready() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        for _ in range(2):
            gateway.router.registry.failed("a")
        async with gateway.client.get(gateway.url + "/ready") as response:
            assert response.status == 503
        async with gateway.client.get(gateway.url + "/health") as response:
            assert response.status == 200


async def test_operators_see_decisions_and_pods_on_the_admin_listener() -> None:
    async with pod(ok) as url, rig(url) as gateway:
        explain = f"{gateway.admin_url}/debug/route?path=/v1/completions"
        async with gateway.client.post(explain, data=BODY) as response:
            assert await response.json() == {"path": "/v1/completions", "length": len(BODY)}
        async with gateway.client.get(f"{gateway.admin_url}/debug/pods") as response:
            (card,) = (await response.json())["pods"]
        assert (card["name"], card["url"], card["healthy"], card["metrics"]) == ("a", url, True, None)
        assert gateway.router.dispatched == []


class Slow:
    """A pod that streams one chunk, and the last one when it may proceed."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.proceed = asyncio.Event()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first ")
        self.running.set()
        await self.proceed.wait()
        await response.write(b"last")
        return response


async def test_draining_takes_no_more_requests_and_lets_those_in_flight_finish() -> None:
    slow = Slow()
    async with pod(slow) as url, rig(url) as gateway:
        async with gateway.client.get(gateway.url + "/health") as idle:
            assert idle.status == 200
        request = asyncio.create_task(gateway.client.post(gateway.url + CHAT, data=BODY))
        await slow.running.wait()
        response = await request
        drain = asyncio.create_task(gateway.gateway.drain())
        await eventually(lambda: says_draining(gateway))
        with pytest.raises(aiohttp.ClientConnectionError):
            await gateway.client.get(gateway.url + "/health")
        assert not drain.done()
        slow.proceed.set()
        assert await response.read() == b"first last"
        await asyncio.wait_for(drain, DEADLINE_SECONDS)
        assert gateway.router.reports[-1] == "closed"


async def says_draining(gateway: Rig) -> bool:
    async with gateway.client.get(gateway.admin_url + "/ready") as probe:
        return probe.status == 503 and probe.headers["Connection"] == "close"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_response_begun_while_draining_ends_its_connection(streamed: bool) -> None:
    proceed, reached = asyncio.Event(), asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        reached.set()
        await proceed.wait()
        response = web.Response(body=b"done")
        if streamed:
            response.enable_chunked_encoding()
        return response

    async with pod(handle) as url, rig(url) as gateway:
        request = asyncio.create_task(gateway.client.post(gateway.url + CHAT, data=BODY))
        await reached.wait()
        drain = asyncio.create_task(gateway.gateway.drain())
        await eventually(lambda: says_draining(gateway))
        proceed.set()
        async with await request as response:
            assert response.headers["Connection"] == "close"
            assert await response.read() == b"done"
        await asyncio.wait_for(drain, DEADLINE_SECONDS)


async def test_what_outlives_the_drain_is_cancelled_and_accounted_for() -> None:
    slow = Slow()
    async with pod(slow) as url, rig(url, drain=DrainConfig(timeout_seconds=0.2)) as gateway:
        response = await gateway.client.post(gateway.url + CHAT, data=BODY)
        await asyncio.wait_for(gateway.gateway.drain(), DEADLINE_SECONDS)
        assert gateway.router.reports[-1] == "closed"
        assert gateway.sample("in_flight", pod="a") == 0
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_an_error_inside_the_context_does_not_wait_for_requests() -> None:
    slow = Slow()
    async with pod(slow) as url, asyncio.timeout(DEADLINE_SECONDS):
        context = rig(url, drain=DrainConfig(timeout_seconds=FOREVER))
        gateway = await context.__aenter__()
        response = await gateway.client.post(gateway.url + CHAT, data=BODY)
        assert not await context.__aexit__(ZeroDivisionError, ZeroDivisionError(), None)
        assert gateway.router.reports[-1] == "closed"
        response.close()


async def test_an_address_that_is_taken_leaves_nothing_open() -> None:
    async with rig() as first:
        taken = first.url.removeprefix("http://")
        config = Config(listen=taken, admin=f"{LOOPBACK}:0")
        second = Gateway(config, api={}, admin={}, draining=asyncio.Event())
        with pytest.raises(OSError, match="in use"):
            await second.__aenter__()
        assert second.admin_url is not None
        with pytest.raises(aiohttp.ClientConnectionError):
            await first.client.get(second.admin_url + "/health")
