"""Connections to pods: framing that cannot be trusted, what is reused, and what is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from multidict import CIMultiDict

from matrixinfer.config import LimitsConfig
from matrixinfer.gateway.pod_connection import MAX_HEAD_BYTES, MAX_HEADERS, AttemptFailed
from matrixinfer.gateway.upstream import Upstream, upstream
from matrixinfer.telemetry.metrics import Metrics
from tests.integration.gateway_support import Talk, raw_pod, read_request
from tests.waiting import DEADLINE_SECONDS

Post = Callable[..., Awaitable[tuple[int, bytes]]]
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
LIMITS = LimitsConfig(first_byte_timeout_seconds=DEADLINE_SECONDS)


def answering(answer: bytes, *, close: bool = False) -> Talk:
    """A pod that answers every request with these bytes, and then closes the connection or not."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(answer)
            await writer.drain()
            if close:
                return

    return talk


@asynccontextmanager
async def client(talk: Talk, limits: LimitsConfig = LIMITS) -> AsyncIterator[Post]:
    async with raw_pod(talk) as url:
        with upstream(limits, Metrics()) as connections:
            yield _poster(connections, url)


def _poster(connections: Upstream, url: str) -> Post:
    async def post(body: bytes = b"{}", **headers: str) -> tuple[int, bytes]:
        answer = await connections.send("POST", url, "/v1/completions", body, CIMultiDict(headers))
        try:
            return answer.status, await answer.read()
        finally:
            answer.close()

    return post


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (WHOLE, b"{}"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + WHOLE, b"{}"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + WHOLE, b"{}"),
        (CHUNKED + b"1\r\n{\r\n1;ext=1\r\n}\r\n0\r\nx-trailer: 1\r\n\r\n", b"{}"),
        (b"HTTP/1.1 200 OK\r\n\r\nup to the end", b"up to the end"),
        (b"HTTP/1.0 200 OK\r\n\r\nup to the end", b"up to the end"),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}", b"{}"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n{}", b""),
        (WHOLE + b"garbage", b"{}"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}garbage", b"{}"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nup to the end", b"up to the end"),
    ],
)
async def test_every_way_to_end_an_answer_is_understood(answer: bytes, expected: bytes) -> None:
    async with client(answering(answer, close=True)) as post:
        assert (await post())[1] == expected


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
        CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"2\r\n{}",
        CHUNKED + b"2\r\n{}00\r\n\r\n",
        CHUNKED + b"1;" + b"x" * (2 * MAX_HEAD_BYTES),
        CHUNKED + b"0\r\n" + b"x-trailer: 1\r\n" * MAX_HEAD_BYTES,
        b"HTTP/1.1 100 Continue\r\n\r\n" * MAX_HEAD_BYTES,
        b"HTTP/1.1 110 Interim\r\nContent-Length: 5\r\n\r\nhello" + WHOLE,
        b"HTTP/1.1 000 Interim\r\nContent-Length: 5\r\n\r\nhello" + WHOLE,
        b"HTTP/1.1 150 Interim\r\nContent-Length: 900000\r\n\r\n" + b"x" * 900_000 + WHOLE,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-many: 1\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx-long: " + b"x" * (2 * MAX_HEAD_BYTES),
        b"HTTP/1.1 200 OK\r\nbad name: 1\r\n\r\n",
        b"HTTP/1.1 2\x00",
        b"HTTP/1.1 999999 OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"{}",
        b"",
    ],
)
async def test_an_answer_that_is_cut_short_or_malformed_is_a_failure(answer: bytes) -> None:
    async with client(answering(answer, close=True)) as post:
        with pytest.raises(AttemptFailed) as caught:
            await post()
    assert caught.value.kind in ("protocol", "disconnect")
    assert caught.value.was_sent


def counting(answer: bytes) -> tuple[Talk, list[list[bytes]]]:
    """A pod, and the requests of each of its connections."""
    connections: list[list[bytes]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests: list[bytes] = []
        connections.append(requests)
        while True:
            requests.append(await read_request(reader))
            writer.write(answer)
            await writer.drain()

    return talk, connections


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (WHOLE, 1),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, 1),
        (CHUNKED + b"2\r\n{}\r\n0\r\n\r\n", 1),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", 2),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", 2),
        (WHOLE + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n{evil}", 2),
        (WHOLE + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n{", 2),
    ],
)
async def test_a_connection_is_reused_only_if_nothing_follows_the_answer(answer: bytes, connections: int) -> None:
    talk, seen = counting(answer)
    async with client(talk) as post:
        assert [await post(), await post()] == [(200, b"{}")] * 2
    assert len(seen) == connections


async def test_bytes_that_nobody_asked_for_are_no_answer_to_the_next_request() -> None:
    unsolicited = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(WHOLE)
            await writer.drain()
            if not unsolicited.is_set():
                await asyncio.sleep(0.05)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n{evil}")
                await writer.drain()
                unsolicited.set()

    async with client(talk) as post:
        assert await post() == (200, b"{}")
        await unsolicited.wait()
        await asyncio.sleep(0.05)
        assert await post() == (200, b"{}")


async def test_an_answer_before_the_whole_body_was_taken_counts_and_ends_the_connection() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        await asyncio.sleep(DEADLINE_SECONDS)  # reads no further

    async with client(talk) as post:
        body = bytes(32 * 1024 * 1024)
        assert await post(body) == (413, b"{}")
        assert await post(body) == (413, b"{}")
    assert connections == 2


async def test_a_pod_that_takes_no_more_of_a_body_is_silent() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(DEADLINE_SECONDS)

    async with client(talk, LimitsConfig(first_byte_timeout_seconds=0.2)) as post:
        with pytest.raises(AttemptFailed) as caught:
            await post(bytes(32 * 1024 * 1024))
    assert caught.value.kind == "timeout"


async def test_a_body_that_nobody_reads_waits_at_the_pod() -> None:
    size, sent = 64 * 1024 * 1024, 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 65536):
            writer.write(bytes(65536))
            await writer.drain()
            sent += 65536

    async with raw_pod(talk) as url:
        with upstream(LIMITS, Metrics()) as connections:
            answer = await connections.send("POST", url, "/", b"{}", CIMultiDict())
            await asyncio.sleep(0.5)
            assert sent < size // 2
            assert len(await answer.read()) == size
            answer.close()


async def test_a_header_cannot_add_a_line() -> None:
    async with client(answering(WHOLE)) as post:
        with pytest.raises(ValueError, match="end of a line"):
            await post(x="1\r\nx-data-parallel-rank: 3")
