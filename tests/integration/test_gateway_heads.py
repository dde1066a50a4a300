"""Heads pass with the bytes that came in, in both directions."""

from __future__ import annotations

import asyncio

import pytest

from matrixinfer.gateway.upstream import MAX_WHOLE_BYTES
from tests.integration.gateway_support import raw_pod, read_request, rig
from tests.integration.test_gateway_connections import REQUEST, connected

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n%s\r\n{}"


async def both_sides(fields: bytes = b"", answer: bytes = ANSWER % b"") -> tuple[bytes, bytes]:
    """What the pod got of a request with these header fields, and what the client got of the answer."""
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(answer)
        await writer.drain()

    async with raw_pod(talk) as url, rig(url) as gateway, connected(gateway) as (reader, writer):
        writer.write(REQUEST.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n" + fields))
        received = await reader.read()
    return seen[0], received


@pytest.mark.parametrize(
    "value", [b"M\xfcller", "Müller 日本 🎈".encode(), bytes(range(0x80, 0x100)), b"\xff \xc3\xbc"]
)
async def test_bytes_above_127_pass_unchanged(value: bytes) -> None:
    field = b"x-user: %s\r\n" % value
    sent, received = await both_sides(field, ANSWER % field)
    assert field in sent
    assert field in received
    assert received.endswith(b"\r\n\r\n{}")


async def test_the_words_of_a_status_pass_unchanged() -> None:
    _, received = await both_sides(answer=(ANSWER % b"").replace(b"OK", b"fr\xfch da"))
    assert received.startswith(b"HTTP/1.1 200 fr\xfch da\r\n")


async def test_a_stream_s_head_passes_unchanged_as_well() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx-user: M\xfcller\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    _, received = await both_sides(answer=chunked)
    assert b"\r\nx-user: M\xfcller\r\n" in received
    assert received.endswith(b"2\r\n{}\r\n0\r\n\r\n")


async def test_an_answer_with_a_control_character_in_its_head_is_not_valid() -> None:
    _, received = await both_sides(answer=ANSWER % b"x-odd: a\x01b\xfc\x7f.\r\n")
    assert received.startswith(b"HTTP/1.1 502 ")


@pytest.mark.parametrize("size", [2, MAX_WHOLE_BYTES + 5])
async def test_connection_fields_of_a_pod_stay_there_but_the_length_is_kept(size: int) -> None:
    fields = b"Connection: x-one, Content-Length\r\nConnection: x-two\r\nx-one: 1\r\nx-two: 2\r\nx-three: 3\r\n"
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (size, fields, b"y" * size)
    _, received = await both_sides(answer=answer)
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"\r\nContent-Length: %d" % size in head
    assert b"x-three: 3" in head
    assert b"x-one" not in head
    assert b"x-two" not in head
    assert len(body) == size


async def test_a_header_that_is_too_long_is_refused_in_these_words() -> None:
    async with rig() as gateway, connected(gateway) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\n\r\n" % (b"y" * 12_000))
        answer = await reader.read()
    assert b" 431 " in answer.partition(b"\r\n")[0]
    assert b"exceeds 8190 bytes" in answer


@pytest.mark.parametrize(("count", "status"), [(120, b"200"), (129, b"431"), (1000, b"431")])
async def test_too_many_headers_are_refused_as_too_long_ones_are(count: int, status: bytes) -> None:
    async with rig() as gateway, connected(gateway) as (reader, writer):
        fields = b"".join(b"x-%d: 1\r\n" % number for number in range(count))
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n" % fields)
        answer = await reader.read()
    assert answer.split(b" ")[1] == status
    assert (b"more than 128 headers" in answer) == (status == b"431")
