"""An engine and a client that take as little CPU time as Python can: they count bytes. For well-formed messages only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import cast

_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


def response(body: bytes, kind: bytes = b"application/json") -> bytes:
    """An answer with status 200."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)


def request(host: str, path: str, body: bytes) -> bytes:
    """A POST of JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Messages(asyncio.Protocol):
    """Cuts what arrives into messages, each with a head and as many bytes as it says."""

    def __init__(self) -> None:
        self._buffer = b""
        self.transport = asyncio.Transport()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        while (end := self._end()) and len(self._buffer) >= end:
            message, self._buffer = self._buffer[:end], self._buffer[end:]
            self.received(message)

    def _end(self) -> int:
        """Where the first message ends; 0 while that is not known."""
        head = self._buffer.find(_END)
        if head < 0:
            return 0
        lower = self._buffer[: head + 2].lower()
        at = lower.find(_LENGTH)
        length = 0 if at < 0 else int(lower[at + len(_LENGTH) : lower.index(b"\r", at)])
        return head + len(_END) + length

    def received(self, message: bytes) -> None:
        """Take one whole message."""
        raise NotImplementedError


class Engine(_Messages):
    """Answers what is asked by path, at once."""

    def __init__(self, answers: Mapping[bytes, bytes]) -> None:
        super().__init__()
        self._answers = answers

    def received(self, message: bytes) -> None:
        path = message[: message.index(b"\r")].split(b" ")[1]
        self.transport.write(self._answers.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"))


class _Client(_Messages):
    """Sends one request after another for as long as `more` gives one."""

    def __init__(self, more: Callable[[bytes], bytes | None], done: asyncio.Future[None]) -> None:
        super().__init__()
        self._more = more
        self._done = done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.received(b"")

    def received(self, message: bytes) -> None:
        try:
            following = self._more(message)
        except RuntimeError as error:
            self._done.set_exception(error)
            self.transport.close()
            return
        if following is not None:
            self.transport.write(following)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            if self._buffer or exc is not None:
                self._done.set_exception(RuntimeError(f"a connection broke: {exc}"))
            else:
                self._done.set_result(None)


async def drive(host: str, port: int, requests: Sequence[bytes], *, connections: int, seconds: float) -> int:
    """Send `requests` again and again for some seconds; how many were answered. Any failure raises `RuntimeError`."""
    answered, upcoming = 0, cycle(requests)
    until = time.perf_counter() + seconds

    def more(answer: bytes) -> bytes | None:
        nonlocal answered
        if answer:
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"expected status 200, got {answer[:200]!r}")
            answered += 1
        return next(upcoming) if time.perf_counter() < until else None

    loop = asyncio.get_running_loop()
    ends = [loop.create_future() for _ in range(connections)]
    for end in ends:
        await loop.create_connection(partial(_Client, more, end), host, port)
    async with asyncio.timeout(seconds + 30.0):
        await asyncio.gather(*ends)
    return answered
