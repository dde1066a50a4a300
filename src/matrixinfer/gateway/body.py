"""Reads a request's body, bounded in size and time."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from matrixinfer.errors import BodyTimeout, InvalidRequest, PayloadTooLarge, UnsupportedBody

_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


async def read_body(request: web.BaseRequest, *, max_bytes: int, seconds: float) -> bytes:
    """Read the whole body.

    Raises `PayloadTooLarge` and `UnsupportedBody`, before reading anything if headers say so; `InvalidRequest` if the body
    is malformed; and `BodyTimeout` if it does not arrive within `seconds`.
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedBody("The request body is compressed; send it without `Content-Encoding`.")
    declared = request.content_length
    if declared is not None and declared > max_bytes:
        raise _too_large(max_bytes)
    content = request.content
    try:
        if content.is_eof():
            # Most bodies arrive together with their headers.
            body = content.read_nowait()
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
            return _plain(body)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await _invite(request)
        chunks, size = [], 0
        async with asyncio.timeout(seconds):
            while chunk := await content.readany():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise InvalidRequest("The request body is malformed.") from error
    except TimeoutError as error:
        raise BodyTimeout(f"The request body did not arrive within {seconds:g} s.") from error
    return _plain(b"".join(chunks))


def _plain(body: bytes) -> bytes:
    """`body`, unless it says that it is not UTF-8 as JSON must be (RFC 8259, 8.1)."""
    if body.startswith(_MARKS):
        raise InvalidRequest("The request body begins with a byte order mark; send plain UTF-8.")
    return body


async def _invite(request: web.BaseRequest) -> None:
    """Invite a client that sent `Expect: 100-continue` to send its body."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # not part of the response, so an error can still be answered


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body exceeds {max_bytes} bytes.")
