"""Heads of answers with the bytes that came in.

Header values may have bytes above 127 that are not UTF-8 (RFC 9110, 5.5). The library reads them as lone surrogates, but
drops those when it writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11, StreamWriter
from multidict import CIMultiDict

if TYPE_CHECKING:
    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader
    from aiohttp.web_protocol import RequestHandler


class PodResponse(web.StreamResponse):
    """A pod's answer as the client gets it: `body` is all of it, or None if it is streamed.

    The head goes out with the first byte.
    """

    _send_headers_immediately = False

    def __init__(self, status: int, reason: str, headers: CIMultiDict[str], body: bytes | None) -> None:
        super().__init__(status=status, reason=reason, headers=headers)
        self._whole = body
        if body is not None:
            self.headers.setdefault("Content-Length", str(len(body)))

    async def _write_headers(self) -> None:
        await super()._write_headers()
        writer, request = self._payload_writer, self._req
        if isinstance(writer, StreamWriter) and request is not None and not _is_plain(self.reason, self.headers):
            version = request.version
            line = f"HTTP/{version.major}.{version.minor} {self.status} {self.reason}"
            writer._headers_buf = _serialized(line, self.headers)  # noqa: SLF001

    async def write_eof(self, data: bytes = b"") -> None:
        """Write what is left of the body: all of it if it is whole."""
        await super().write_eof(self._whole or data)


class ClientRequest(web.BaseRequest):
    """A client's request. `decorate` adds to the headers of its answer, whatever that is, before they are sent."""

    decorate: Callable[[CIMultiDict[str]], None] | None = None

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        if self.decorate is not None:
            self.decorate(response.headers)
        if self.version < HttpVersion11 and "Connection" not in response.headers:
            response.force_close()  # so it was not told that the connection stays; its end may be that of the body


def incoming(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> ClientRequest:
    """As `web.Server` makes a request, but a `ClientRequest`."""
    return ClientRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())


def _is_plain(line: str, headers: CIMultiDict[str]) -> bool:
    return line.isascii() and "".join(headers.values()).isascii()


def _serialized(line: str, headers: CIMultiDict[str]) -> bytes:
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"{line}\r\n{fields}\r\n".encode("utf-8", "surrogateescape")
