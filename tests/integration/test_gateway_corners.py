"""Answers and connections that are legal but rare, and pods that fail where few look: nothing is lost, nobody waits forever."""

from __future__ import annotations

import asyncio
import io
import random
import time

import pytest

from matrixinfer.config import LimitsConfig
from tests.integration.gateway_support import BODY, FOREVER, LOOPBACK, Talk, ok, pod, raw_pod, read_request, rig

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def large(size: int) -> io.BytesIO:
    """A body of this size, and a little more."""
    return io.BytesIO(BODY[:-1] + b', "padding": "%s"}' % (b"x" * size))


def answering(answer: bytes, *, closes: bool = True) -> Talk:
    """A pod that answers every request with these bytes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await read_request(reader)
                writer.write(answer)
                await writer.drain()
                if closes:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    return talk


@pytest.mark.parametrize(
    "answer",
    {
        "interim responses": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + PLAIN,
        "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n",
        "chunk extensions": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\n\r\n",
        "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nok",
        "HTTP/1.0 with a length": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "no length": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok",
        "a long header": b"HTTP/1.1 200 OK\r\nx-long: " + b"y" * 8000 + b"\r\nContent-Length: 2\r\n\r\nok",
        "a header of 30 kB": b"HTTP/1.1 200 OK\r\nx-long: " + b"y" * 30_000 + b"\r\nContent-Length: 2\r\n\r\nok",
        "no reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
        "lines that end in LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        "bytes above 127": b"HTTP/1.1 200 OK\r\nx-name: \xe4\xff\r\nContent-Length: 2\r\n\r\nok",
    }.items(),
    ids=lambda item: item[0],
)
async def test_rare_answers_pass(answer: tuple[str, bytes]) -> None:
    async with raw_pod(answering(answer[1])) as url, rig(url) as gateway:
        for _ in range(2):
            async with gateway.post() as response:
                assert (response.status, await response.read()) == (200, b"ok")


@pytest.mark.parametrize(
    "head", [b"x-long: " + b"y" * 1_000_000 + b"\r\n", b"x-many: y\r\n" * 100_000], ids=["one header", "many"]
)
async def test_an_answer_with_endless_headers_is_a_502(head: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + head + PLAIN[17:]
    async with raw_pod(answering(answer)) as url, rig(url) as gateway, gateway.post() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "pod_unreachable"


@pytest.mark.parametrize("size", [300_000, 8_000_000])
async def test_a_pod_that_does_not_read_a_large_body_is_a_504(size: int) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(FOREVER)

    limits = LimitsConfig(first_byte_timeout_seconds=1.0)
    async with raw_pod(deaf) as url, rig(url, limits=limits) as gateway:
        began = time.monotonic()
        async with gateway.post(large(size)) as response:
            assert response.status == 504
        assert time.monotonic() - began < 5
        assert gateway.router.reports == ["failed a", "closed"]


async def test_a_pod_that_reads_a_large_body_slowly_has_its_time() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = 8_000_000
        await reader.readuntil(b"\r\n\r\n")
        while left > 0:
            left -= len(await reader.read(500_000))
            await asyncio.sleep(0.02)
        writer.write(PLAIN)
        await writer.drain()

    limits = LimitsConfig(first_byte_timeout_seconds=1.0)
    async with raw_pod(slow) as url, rig(url, limits=limits) as gateway, gateway.post(large(8_000_000)) as response:
        assert response.status == 200


async def test_a_pod_that_answers_before_it_has_read_the_body_is_heard() -> None:
    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        await writer.drain()
        await asyncio.sleep(0.5)

    async with raw_pod(hasty) as url, rig(url) as gateway, gateway.post(large(8_000_000)) as response:
        assert (response.status, await response.read()) == (413, b"no")


@pytest.mark.parametrize("size", [0, 2_000_000])
async def test_connections_that_pods_close_while_they_are_used_again_are_not_seen(size: int) -> None:
    draw = random.Random(1)

    async def fickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await read_request(reader)
                writer.write(PLAIN)
                await writer.drain()
                if draw.random() < 0.5:
                    await asyncio.sleep(draw.random() * 0.01)
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    async with raw_pod(fickle) as url, rig(url) as gateway:

        async def client() -> None:
            for _ in range(4 if size else 40):
                async with gateway.post(large(size)) as response:
                    assert response.status == 200
                await asyncio.sleep(draw.random() * 0.01)

        await asyncio.gather(*(client() for _ in range(30)))
        assert (gateway.sample("retries_total", reason="stale_connection") or 0) > 0
        assert gateway.sample("upstream_errors_total", pod="a", kind="disconnect") is None


async def test_a_pod_may_have_an_ipv6_address() -> None:
    async with raw_pod(answering(PLAIN), "::1") as url, rig(url) as gateway, gateway.post() as response:
        assert (response.status, response.headers["x-matrixinfer-pod"]) == (200, "a")


async def test_a_pod_whose_name_does_not_resolve_is_replaced_by_the_next_one() -> None:
    async with pod(ok) as url, rig("http://no-such-pod.invalid:8000", url) as gateway, gateway.post() as response:
        assert (response.status, response.headers["x-matrixinfer-pod"]) == (200, "b")
        assert LOOPBACK in url
