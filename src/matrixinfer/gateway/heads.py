"""Heads of requests and answers with the bytes that came in.

Header values may have bytes above 127 that are not UTF-8 (RFC 9110, 5.5). The library reads them as lone surrogates, but
drops those when it writes, and it writes no head at all that has a control character, as answers of engines may.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter
from multidict import CIMultiDict

if TYPE_CHECKING:
    from aiohttp.connector import Connection
    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader
    from aiohttp.web_protocol import RequestHandler

_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class HeadWriter(StreamWriter):
    """Writes bytes above 127 as they came, and a space for a control character (RFC 9110, 5.5)."""

    async def write_headers(self, status_line: str, headers: CIMultiDict[str]) -> None:
        """Write the head of an answer."""
        try:
            await super().write_headers(status_line, headers)
        except ValueError:
            status_line = _CONTROLS.sub(" ", status_line)
            headers = CIMultiDict([(name, _CONTROLS.sub(" ", value)) for name, value in headers.items()])
            await super().write_headers(status_line, headers)
        if not _is_plain(status_line, headers):
            self._headers_buf = _serialized(status_line, headers)


class Request(aiohttp.ClientRequest):
    """A request whose head is written with the bytes that its client sent. The library has refused control characters."""

    async def write_bytes(
        self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None
    ) -> None:
        """Write the body, and before it the head, which the library has ready."""
        if isinstance(writer, StreamWriter) and not _is_plain("", self.headers):
            # The target is ASCII: a client's that is not is refused.
            line = f"{self.method} {self.url.raw_path_qs} HTTP/{self.version.major}.{self.version.minor}"
            writer._headers_buf = _serialized(line, self.headers)  # noqa: SLF001 - the library offers no other way
        await super().write_bytes(writer, conn, content_length)


def incoming(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    """A client's request, whose answer is written by a `HeadWriter`."""
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, HeadWriter(protocol, loop), task, loop)


def _is_plain(line: str, headers: CIMultiDict[str]) -> bool:
    return line.isascii() and "".join(headers.values()).isascii()


def _serialized(line: str, headers: CIMultiDict[str]) -> bytes:
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"{line}\r\n{fields}\r\n".encode("utf-8", "surrogateescape")
