"""One client's connection, on aiohttp's low-level server: what the library leaves unbounded or says in its own shape.

- The head of a request is bounded in bytes and in time, so that an unfinished one costs little.
- A malformed request is answered in the API's shape, and logged without its bytes.
- A client may close its sending side after the request and still gets its answer. One that has gone altogether looks
  the same until something is sent to it, so it is sent an interim response: its system then resets the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import structlog
from aiohttp import web
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler

from matrixinfer.gateway import headers
from matrixinfer.gateway.errors import error_response
from matrixinfer.gateway.heads import incoming
from matrixinfer.telemetry.intervals import Intervals

Handle: TypeAlias = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

MAX_HEAD_BYTES = 64 * 1024
MAX_LINE_BYTES = 8190
"""One header, or the target."""
MAX_HEADERS = 128
LINGER_SECONDS = 2.0
"""How long an unwanted body is read and dropped, so that its client can read the answer."""
_LOOK_SECONDS = 0.01
_ASK_SECONDS = (0.0, 0.05, 5.0)
"""Pauses before each question whether a client that sends nothing more still reads. The last one repeats."""

log = structlog.get_logger(__name__)


class Server(web.Server):
    """Makes a `Connection` for each client, at most `max_connections` at a time; None sets no bound."""

    def __init__(
        self,
        handle: Handle,
        *,
        keep_alive_seconds: float,
        head_seconds: float,
        max_connections: int | None,
        noted: Intervals,
    ) -> None:
        super().__init__(
            handle,
            request_factory=incoming,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=keep_alive_seconds,
            lingering_time=LINGER_SECONDS,
            max_headers=MAX_HEADERS,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )
        self._options: dict[str, Any] = dict(self._kwargs)
        self.head_seconds = head_seconds
        self.max_connections = max_connections
        self.noted = noted

    def __call__(self) -> RequestHandler:
        """A protocol for a new connection."""
        return Connection(self, loop=asyncio.get_running_loop(), **self._options)

    def busy(self) -> set[asyncio.Task[None]]:
        """The tasks of the connections that are answering a request. Each ends with its connection."""
        tasks = (each._task_handler for each in self.connections if each._request_in_progress)  # noqa: SLF001
        return {task for task in tasks if task is not None}

    async def first_requests(self, seconds: float) -> None:
        """Wait until every connection has sent a request, which may be on its way, at most for some time."""
        ends = self._loop.time() + seconds
        while self._loop.time() < ends:
            if not any(isinstance(each, Connection) and each.is_unused for each in self.connections):
                return
            await asyncio.sleep(_LOOK_SECONDS)


class Connection(RequestHandler):
    """One client's connection: bounds each head, and notices a client that has gone."""

    __slots__ = ("_asked", "_asking", "_body", "_closing", "_head_bytes", "_head_timer", "_knows_interim", "_limits")

    def __init__(self, server: Server, *, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        super().__init__(server, loop=loop, **options)
        self._limits = server
        self._body: StreamReader = EMPTY_PAYLOAD
        """The body of the last request; a head may follow when it has ended."""
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._asked = 0
        self._asking: asyncio.TimerHandle | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._knows_interim = False
        """Whether the last request is of HTTP/1.1, so that its client must understand interim responses."""

    @property
    def is_unused(self) -> bool:
        """Whether no request has come on it yet."""
        return not self._request_count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse a connection beyond the limit."""
        super().connection_made(transport)
        most = self._limits.max_connections
        if most is not None and len(self._limits.connections) > most:
            if self._limits.noted("connections_refused"):
                log.warning("connections_refused", limit=most)
            self._refuse(b"503 Service Unavailable", b"The gateway has too many connections.", b"Retry-After: 1\r\n")

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head until it is complete."""
        if self._closing is not None:
            return  # it was refused
        count, reads_head = self._request_count, self._body.is_eof()
        super().data_received(data)
        if self._request_count != count:
            message, self._body = self._messages[-1]
            self._knows_interim = getattr(message, "version", None) == HttpVersion11
            self._head_ended()
            return
        if not reads_head or not data:
            return
        if not self._head_bytes:
            self._head_timer = self._loop.call_later(self._limits.head_seconds, self._head_late)
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large", b"The request's headers are too large.")

    def eof_received(self) -> bool | None:  # type: ignore[override]  # the library never keeps the connection open
        """The client sends nothing more. Keep the connection if it waits for an answer that has not begun."""
        if not self._awaits_answer or not self._knows_interim or not self._body.is_eof():
            return None
        if self.transport is None or self.transport.get_extra_info("sslcontext") is not None:
            return None  # TLS ends both ways at once
        if len(self._messages) > 1:
            return None
        self._close = True  # after the answer
        self._ask()
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the timers."""
        self._head_ended()
        for timer in (self._asking, self._closing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP request. The library's message and log line would quote it."""
        kind = type(exc).__name__
        if self._limits.noted(f"request_malformed {kind}"):
            log.warning("request_malformed", kind=kind)
        if isinstance(exc, LineTooLong):
            response = error_response(431, f"A header or the target of the request exceeds {MAX_LINE_BYTES} bytes.")
        elif isinstance(exc, BadHttpMessage) and exc.message.startswith("Too many headers"):
            response = error_response(431, f"The request has more than {MAX_HEADERS} headers.")
        else:
            response = error_response(status, "The request is not valid HTTP." if status < 500 else "Internal error.")
        response.headers["Server"] = headers.SERVER
        response.force_close()
        return response

    def _head_ended(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        self._refuse(b"408 Request Timeout", b"The request's headers did not arrive in time.")

    def _refuse(self, status: bytes, message: bytes, fields: bytes = b"") -> None:
        """Answer without a request, and close when the client has had time to read it. An answer in progress is cut off."""
        self._head_ended()
        transport = self.transport
        if transport is None or self._current_request is not None:
            self.force_close()
            return
        body = b'{"error":{"message":"%s","type":"invalid_request_error","param":null,"code":null}}' % message
        transport.write(
            b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n%s"
            % (status, len(body), fields, body)
        )
        if transport.can_write_eof():
            transport.write_eof()
        self._close = True  # what still comes is dropped
        self._closing = self._loop.call_later(LINGER_SECONDS, self.force_close)

    @property
    def _awaits_answer(self) -> bool:
        """Whether a request has come whose answer has not begun."""
        is_idle = self._waiter is not None and not self._waiter.done()
        request = self._current_request
        return not is_idle and (request is None or not request.writer.output_size)

    def _ask(self) -> None:
        """Send an interim response, unless the answer has begun: then its own bytes will find out."""
        self._asking = None
        transport = self.transport
        if transport is None or not self._awaits_answer:
            return
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._asked += 1
        pause = _ASK_SECONDS[min(self._asked, len(_ASK_SECONDS) - 1)]
        self._asking = self._loop.call_later(pause, self._ask)
