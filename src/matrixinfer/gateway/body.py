"""Reads a request's body, bounded in size and time."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from matrixinfer.errors import BodyTimeout, InvalidRequest, PayloadTooLarge


async def read_body(request: web.BaseRequest, *, max_bytes: int, seconds: float) -> bytes:
    """Read the whole body.

    Raises `PayloadTooLarge`, before reading anything if the client declares too much; `InvalidRequest` if the body is
    malformed; and `BodyTimeout` if it does not arrive within `seconds`.
    """
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
            return body
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
    return b"".join(chunks)


async def _invite(request: web.BaseRequest) -> None:
    """Invite a client that sent `Expect: 100-continue` to send its body."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # not part of the response, so an error can still be answered


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body exceeds {max_bytes} bytes.")
