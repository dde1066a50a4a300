"""Reading a request's body, within bounds of size and time."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from matrixinfer.errors import BodyTimeout, InvalidRequest, PayloadTooLarge


async def read_body(request: web.BaseRequest, *, max_bytes: int, seconds: float) -> bytes:
    """The whole body.

    Raises `PayloadTooLarge` before reading where the client declares too much, `InvalidRequest` when the body is
    malformed, and `BodyTimeout` when it has not come within `seconds`.
    """
    declared = request.content_length
    if declared is not None and declared > max_bytes:
        raise _too_large(max_bytes)
    content = request.content
    try:
        if content.is_eof():
            # Most bodies come together with their headers.
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
        raise BodyTimeout(f"The request body did not come within {seconds:g} s.") from error
    return b"".join(chunks)


async def _invite(request: web.BaseRequest) -> None:
    """Tell a client that asked first that it may send its body."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # no part of the response: an error may still be answered


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body exceeds {max_bytes} bytes.")
