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
from aiohttp.http import StreamWriter
from multidict import CIMultiDict

if TYPE_CHECKING:
    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader
    from aiohttp.web_protocol import RequestHandler


class HeadWriter(StreamWriter):
    """Writes bytes above 127 as they came."""

    async def write_headers(self, status_line: str, headers: CIMultiDict[str]) -> None:
        """Write the head of an answer."""
        await super().write_headers(status_line, headers)
        if not _is_plain(status_line, headers):
            self._headers_buf = _serialized(status_line, headers)


class ClientRequest(web.BaseRequest):
    """A client's request. `decorate` adds to the headers of its answer, whatever that is, before they are sent."""

    decorate: Callable[[CIMultiDict[str]], None] | None = None

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        if self.decorate is not None:
            self.decorate(response.headers)


def incoming(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> ClientRequest:
    """A client's request, whose answer is written by a `HeadWriter`."""
    loop = asyncio.get_running_loop()
    return ClientRequest(message, payload, protocol, HeadWriter(protocol, loop), task, loop)


def _is_plain(line: str, headers: CIMultiDict[str]) -> bool:
    return line.isascii() and "".join(headers.values()).isascii()


def _serialized(line: str, headers: CIMultiDict[str]) -> bytes:
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"{line}\r\n{fields}\r\n".encode("utf-8", "surrogateescape")
