"""Comments in a stream of server-sent events while its engine is silent, so that nothing on the way gives it up."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

COMMENT = b": keep-alive\n\n"
"""Clients skip lines that begin with a colon (HTML, 9.2.6)."""
_EVENT_END = re.compile(rb"(?:\n|\r(?!\n))(?:\r\n|\n)\Z")
_KEPT = 4


class KeepAlive:
    """Reads a stream with `read`, and calls `send` with a comment whenever that takes longer than `seconds`.

    A comment never splits an event: none is sent before the empty line that ends the last one has been passed on.
    """

    __slots__ = ("_end", "_read", "_seconds", "_send")

    def __init__(
        self, seconds: float, read: Callable[[], Awaitable[bytes]], send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self._seconds = seconds
        self._read = read
        self._send = send
        self._end = b"\n\n"
        """The last bytes that were passed on."""

    async def read(self) -> bytes:
        """The next bytes of the stream; nothing at its end."""
        while True:
            chunk = await read_within(self._seconds, self._read)
            if chunk is not None:
                return chunk
            if _EVENT_END.search(self._end):
                await self._send(COMMENT)

    def passed(self, chunk: bytes) -> None:
        """These bytes were passed on to the client."""
        if chunk:
            self._end = (self._end + chunk)[-_KEPT:] if len(chunk) < _KEPT else chunk[-_KEPT:]


async def read_within(seconds: float, read: Callable[[], Awaitable[bytes]]) -> bytes | None:
    """What `read` reads; None if that takes longer than `seconds`. It can then be read later."""
    try:
        async with asyncio.timeout(seconds):
            return await read()
    except TimeoutError:
        return None
