"""When a request goes to another pod, and when it must not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from matrixinfer.config import LimitsConfig, PodWatchConfig, RetriesConfig
from tests.integration.gateway_support import FOREVER, Rig, nowhere, ok, pod, raw_pod, read_request, rig
from tests.waiting import eventually


async def outcome(gateway: Rig) -> tuple[int, str | None]:
    async with gateway.post() as response:
        await response.read()
        return response.status, response.headers.get("x-matrixinfer-pod")


def refusing(status: int, seen: list[int], **headers: str):  # type: ignore[no-untyped-def]
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        seen.append(status)
        return web.Response(status=status, body=b'{"error":"no"}', headers=headers)

    return handle


@asynccontextmanager
async def pods_that(talk, count: int) -> AsyncIterator[list[str]]:  # type: ignore[no-untyped-def]
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(raw_pod(talk)) for _ in range(count)]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_pod_that_refuses_is_replaced_by_the_next_one(status: int) -> None:
    seen: list[int] = []
    async with pod(refusing(status, seen)) as busy, pod(ok) as url, rig(busy, url) as gateway:
        assert await outcome(gateway) == (200, "b")
        assert seen == [status]
        assert gateway.sample("retries_total", reason=str(status)) == 1


@pytest.mark.parametrize(("status", "statuses", "answered"), [(500, (503,), 500), (500, (500,), 200), (400, (), 400)])
async def test_other_statuses_are_passed_on_unless_they_are_configured(
    status: int, statuses: tuple[int, ...], answered: int
) -> None:
    retries = RetriesConfig(statuses=statuses, jitter_seconds=0.0)
    async with pod(refusing(status, [])) as broken, pod(ok) as url, rig(broken, url, retries=retries) as gateway:
        assert (await outcome(gateway))[0] == answered


async def test_when_all_refuse_the_client_gets_the_last_answer_with_its_retry_after() -> None:
    first, second = refusing(503, [], **{"Retry-After": "3"}), refusing(429, [], **{"Retry-After": "7"})
    async with pod(first) as a, pod(second) as b, rig(a, b) as gateway, gateway.post() as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "7")
        assert response.headers["x-matrixinfer-pod"] == "b"
        assert await response.read() == b'{"error":"no"}'


async def test_a_refusal_is_a_better_answer_than_a_pod_that_cannot_be_reached() -> None:
    refuse = refusing(503, [], **{"Retry-After": "3"})
    async with pod(refuse) as a, rig(a, nowhere()) as gateway, gateway.post() as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "3")


async def test_a_spent_budget_ends_retries_but_not_those_that_cost_no_pod_anything() -> None:
    retries = RetriesConfig(budget_share=0.0, budget_per_second=0.0, jitter_seconds=0.0)
    async with pod(refusing(503, [])) as a, pod(ok) as b, rig(a, b, retries=retries) as gateway:
        assert (await outcome(gateway))[0] == 503
    async with pod(ok) as b, rig(nowhere(), b, retries=retries) as gateway:
        assert await outcome(gateway) == (200, "b")


@pytest.mark.parametrize(("allowed", "sends"), [(0, 1), (1, 2), (2, 3)])
async def test_a_request_that_breaks_engines_is_not_sent_round(allowed: int, sends: int) -> None:
    received = 0

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await read_request(reader)
        received += 1

    retries = RetriesConfig(after_send=allowed, jitter_seconds=0.0)
    async with pods_that(die, 4) as urls, rig(*urls, limits=LimitsConfig(max_attempts=4), retries=retries) as gateway:
        assert (await outcome(gateway))[0] == 502
    assert received == sends


async def test_a_request_that_kills_an_engine_on_a_kept_connection_still_counts_as_sent() -> None:
    """The engine dies while it serves a kept connection, and then refuses the new one: another pod gets the request once."""
    received: list[str] = []

    def mortal(name: str):  # type: ignore[no-untyped-def]
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                head = await read_request(reader)
                if not head:
                    return
                if b"kill" in head:
                    received.append(name)
                    return
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                await writer.drain()

        return talk

    async with raw_pod(mortal("a")) as a, raw_pod(mortal("b")) as b, raw_pod(mortal("c")) as c, rig(a, b, c) as gateway:
        assert await outcome(gateway) == (200, "a")
        registry = gateway.router.registry
        registry.failed("a")
        registry.failed("a")
        registry.failed("a")
        assert await outcome(gateway) == (200, "b")
        registry.answered("a")
        async with gateway.post(b'{"model": "tiny", "messages": "kill"}') as response:
            assert response.status == 502
    # Twice at a: its connection might have been closed for idleness. Then one other pod, once, and no more.
    assert received == ["a", "a", "b"]


async def test_a_request_moves_away_from_a_pod_that_goes_down_before_the_first_byte() -> None:
    arrived = asyncio.Event()

    async def freeze(request: web.BaseRequest) -> web.StreamResponse:
        arrived.set()
        await asyncio.sleep(FOREVER)
        return web.Response()

    watch = PodWatchConfig(unhealthy_after_failures=1)
    async with pod(freeze) as frozen, pod(ok) as url, rig(frozen, url, watch=watch) as gateway:
        sent = asyncio.create_task(outcome(gateway))
        await arrived.wait()
        gateway.router.registry.failed("a")  # as the watcher reports
        assert await sent == (200, "b")
        assert gateway.sample("upstream_errors_total", pod="a", kind="went_down") == 1
        assert gateway.router.registry.pods[0].when_down == {}


async def test_a_request_to_a_frozen_pod_stays_when_no_other_may_get_it() -> None:
    arrived, proceed = asyncio.Event(), asyncio.Event()

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        arrived.set()
        await proceed.wait()
        return await ok(request)

    watch = PodWatchConfig(unhealthy_after_failures=1)
    async with pod(slow) as url, rig(url, watch=watch) as gateway:
        sent = asyncio.create_task(outcome(gateway))
        await arrived.wait()
        gateway.router.registry.failed("a")
        proceed.set()
        assert await sent == (200, "a")


async def test_a_stream_that_goes_on_for_too_long_is_cut() -> None:
    async def talk_on(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"data: more\n\n")
            await asyncio.sleep(0.02)

    limits = LimitsConfig(request_timeout_seconds=1.0)
    async with pod(talk_on) as url, rig(url, limits=limits) as gateway, gateway.post() as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
        await eventually(lambda: gateway.router.reports[-2:] == ["first_byte", "closed"])


async def test_an_answer_that_takes_longer_than_all_attempts_may_is_a_504() -> None:
    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(FOREVER)
        return web.Response()

    limits = LimitsConfig(request_timeout_seconds=0.5)
    async with pod(slow) as url, rig(url, limits=limits) as gateway:
        assert (await outcome(gateway))[0] == 504
        assert gateway.router.reports == ["timed_out a", "closed"]
