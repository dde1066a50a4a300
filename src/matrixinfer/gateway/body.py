"""Reads requests' bodies, each bounded in size and time, and all together in memory."""

from __future__ import annotations

import asyncio

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from matrixinfer.config import LimitsConfig
from matrixinfer.errors import BodyTimeout, InvalidRequest, Overloaded, PayloadTooLarge, UnsupportedBody
from matrixinfer.prompt.memory import Held, Memory
from matrixinfer.telemetry.intervals import Intervals

_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_COPIES = 2
"""A byte of a body counts this often: as the client sent it, and in what is kept of it or rewritten for a pod."""

log = structlog.get_logger(__name__)


class Bodies:
    """The bodies of all requests that this process is handling."""

    def __init__(self, limits: LimitsConfig, memory: Memory, noted: Intervals) -> None:
        self._limits = limits
        self._memory = memory
        self._noted = noted

    def reconfigure(self, limits: LimitsConfig) -> None:
        """Keep these limits from now on."""
        self._limits = limits
        self._memory.limit = limits.memory_bytes

    def hold(self) -> Held:
        """What one request holds. Keep its context open for as long as its body is needed."""
        return self._memory.hold()

    async def read(self, request: web.BaseRequest, held: Held, *, is_text: bool = True) -> bytes:
        """Read a body, as `read_body` does."""
        limits = self._limits
        most = min(limits.max_body_bytes, self._memory.largest // _COPIES)
        try:
            return await read_body(request, held, max_bytes=most, seconds=limits.body_timeout_seconds, is_text=is_text)
        except Overloaded:
            self._memory.refused += 1
            if self._noted("requests_refused"):
                log.warning("requests_refused", held_bytes=self._memory.used, limit_bytes=self._memory.limit)
            raise


async def read_body(
    request: web.BaseRequest, held: Held, *, max_bytes: int, seconds: float, is_text: bool = True
) -> bytes:
    """Read the whole body, for which memory is taken as it arrives. `is_text`: it must be UTF-8, as JSON is.

    Raises `PayloadTooLarge`, `UnsupportedBody` and `Overloaded`, before reading anything if headers say so; `InvalidRequest`
    if the body is malformed; and `BodyTimeout` if it does not arrive within `seconds`.
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedBody("The request body is compressed; send it without `Content-Encoding`.")
    declared = request.content_length
    if declared is not None:
        if declared > max_bytes:
            raise _too_large(max_bytes)
        if not held.fits(declared * _COPIES):
            raise _no_room()
    content = request.content
    try:
        if content.is_eof():
            # Most bodies arrive together with their headers.
            body = content.read_nowait()
            _take(held, len(body), 0, max_bytes)
            return _plain(body) if is_text else body
        if request.headers.get("Expect", "").lower() == "100-continue":
            await _invite(request)
        chunks, size = [], 0
        async with asyncio.timeout(seconds):
            while chunk := await content.readany():
                _take(held, len(chunk), size, max_bytes)
                size += len(chunk)
                chunks.append(chunk)
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise InvalidRequest("The request body is malformed.") from error
    except TimeoutError as error:
        raise BodyTimeout(f"The request body did not arrive within {seconds:g} s.") from error
    body = b"".join(chunks)
    return _plain(body) if is_text else body


def _take(held: Held, count: int, before: int, max_bytes: int) -> None:
    """Take memory for `count` further bytes of a body."""
    if before + count > max_bytes:
        raise _too_large(max_bytes)
    if not held.take(count * _COPIES):
        raise _no_room()


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


def _no_room() -> Overloaded:
    return Overloaded("The gateway holds as many bytes of requests as it may. Try again later.")
