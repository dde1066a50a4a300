"""One listening address: it dispatches requests by path and method, and lets them finish when it stops."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias

import structlog
from aiohttp import web

from matrixinfer.config import ConnectionsConfig
from matrixinfer.errors import MatrixInferError
from matrixinfer.gateway import headers
from matrixinfer.gateway.connection import Server
from matrixinfer.gateway.cors import Cors
from matrixinfer.gateway.errors import error_response, response_to
from matrixinfer.gateway.handshakes import Handshakes
from matrixinfer.gateway.heads import ClientRequest
from matrixinfer.gateway.sockets import ANY, BACKLOG, accept_waiting, open_for_both, refuse
from matrixinfer.gateway.tls import ListenerTls
from matrixinfer.prompt.anthropic import MESSAGES_PATH
from matrixinfer.telemetry.intervals import Intervals

Handler: TypeAlias = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Routes: TypeAlias = Mapping[str, Mapping[str, Handler]]
"""Path to method to handler. A path that ends with a slash, other than `/`, stands for all below it that are not listed
themselves."""

CANCEL_SECONDS = 5.0
"""How long a cancelled request may take to clean up."""
_BEGIN_SECONDS = 0.5
"""How long a new connection's first request is waited for when the listener stops."""
_NOTED_SECONDS = 10.0
"""How often a kind of bad connection is logged."""

log = structlog.get_logger(__name__)


class Listener:
    """Serves `routes` at an address while its context is open. Leaving it cancels what is in flight: call `stop` first.

    At most `max_connections` are open at a time; None sets no bound. `bound` is a socket to listen on instead: that of an
    address which other processes listen on, too, or a Unix socket. Once `draining` is set, every answer ends its
    connection. Built on aiohttp's low-level server, because an
    `Application` resolves, wraps and copies where one dictionary lookup will do.
    """

    def __init__(
        self,
        host: str,
        port: int,
        routes: Routes,
        draining: asyncio.Event,
        *,
        connections: ConnectionsConfig | None = None,
        max_connections: int | None = None,
        bound: socket.socket | None = None,
        cors: Cors | None = None,
        tls: ListenerTls | None = None,
    ) -> None:
        self._bound = bound
        self._tls = tls
        self._handshakes: Handshakes | None = None
        self._stack = AsyncExitStack()
        self._cors = cors
        self._host = host
        self._port = port
        self._routes = routes
        self._draining = draining
        self._connections = connections or ConnectionsConfig()
        self._max_connections = max_connections
        self._server: Server | None = None
        self._listening: asyncio.Server | None = None
        self._adopted: dict[int, asyncio.Server] = {}

    async def __aenter__(self) -> Self:
        """Listen. Raises `OSError` when the address is taken, and `ConfigError` when its certificate cannot be read."""
        context = None
        if self._tls is not None:
            await self._stack.enter_async_context(self._tls)
            context = self._tls.context()
        self._server = Server(
            self._serve,
            keep_alive_seconds=self._connections.keep_alive_seconds,
            head_seconds=self._connections.head_timeout_seconds,
            max_connections=self._max_connections,
            noted=Intervals(_NOTED_SECONDS, time.monotonic),
        )
        loop = asyncio.get_running_loop()
        where: dict[str, Any] = {"host": self._host, "port": self._port}
        if self._bound is not None:
            where = {"sock": self._bound}
        elif self._host == ANY:
            where = {"sock": open_for_both(self._port)}
        is_local = self._bound is not None and self._bound.family == socket.AF_UNIX
        listen = loop.create_unix_server if is_local else loop.create_server
        try:
            self._listening = await listen(self._server, backlog=BACKLOG, start_serving=context is None, **where)
            if context is not None:
                self._handshakes = Handshakes(self._server, context, self._connections.head_timeout_seconds)
                self._handshakes.listen(self._listening)
        except BaseException:
            await self._stack.aclose()
            raise
        if is_local:
            return self
        self._port = self._listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop(0.0)
        finally:
            await self._stack.aclose()

    @property
    def url(self) -> str:
        """Base URL, with the port in use."""
        scheme = "http" if self._tls is None else "https"
        return (
            f"{scheme}://[{self._host}]:{self._port}" if ":" in self._host else f"{scheme}://{self._host}:{self._port}"
        )

    async def adopt(self, key: int, bound: socket.socket) -> None:
        """Accept connections of another socket as well, until `release`. No effect once it stops."""
        if self._server is None or key in self._adopted:
            bound.close()
            return
        loop = asyncio.get_running_loop()
        adopted = await loop.create_server(self._server, sock=bound, backlog=BACKLOG, start_serving=self._tls is None)
        self._adopted[key] = adopted
        if self._handshakes is not None:
            self._handshakes.listen(adopted)

    def release(self, key: int) -> None:
        """Leave further connections of an adopted socket to others."""
        adopted = self._adopted.pop(key, None)
        if adopted is not None:
            self._leave(adopted)

    async def stop(self, grace: float) -> None:
        """Stop accepting, close idle connections now and busy ones after their answer, at most `grace` seconds later."""
        server, listening = self._server, self._listening
        if server is None or listening is None:
            return
        self._server = self._listening = None
        for key, adopted in tuple(self._adopted.items()):
            refuse(adopted)
            self.release(key)
        waiting = accept_waiting(listening)
        if self._bound is not None:
            refuse(listening)
        self._leave(listening)
        loop = asyncio.get_running_loop()
        await self._accept(server, waiting, min(grace, _BEGIN_SECONDS))
        ends = loop.time() + grace
        await server.first_requests(min(grace, _BEGIN_SECONDS))
        server.pre_shutdown()
        async with asyncio.TaskGroup() as group:
            group.create_task(server.shutdown(grace + CANCEL_SECONDS))
            group.create_task(self._finish(server, ends))

    def _leave(self, listening: asyncio.Server) -> None:
        """Accept no more connections there."""
        if self._handshakes is not None:
            self._handshakes.leave(listening)
        listening.close()

    async def _accept(self, server: Server, waiting: Sequence[socket.socket], seconds: float) -> None:
        """Accept connections. Those with TLS get so many seconds for their handshakes."""
        loop = asyncio.get_running_loop()
        for connection in waiting:
            if self._handshakes is None:
                await loop.connect_accepted_socket(server, connection)
            else:
                self._handshakes.take(connection)
        if self._handshakes is not None:
            await self._handshakes.finish(seconds)

    async def _finish(self, server: Server, ends: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (busy := server.busy()) and (left := ends - loop.time()) > 0:  # requests may still begin
                await asyncio.wait(busy, timeout=left)
        except asyncio.CancelledError:
            busy = server.busy()
            log.warning("requests_cut", requests=len(busy))
            for task in busy:
                task.cancel()
            raise
        if busy:
            log.warning("requests_cancelled", requests=len(busy))
            for task in busy:
                task.cancel()
            await asyncio.wait(busy, timeout=CANCEL_SECONDS)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._cors is not None and isinstance(request, ClientRequest):
            request.decorate = partial(self._cors.decorate, request, is_preflight=request.method == "OPTIONS")
        try:
            response = await self._dispatch(request)
        except MatrixInferError as error:
            response = response_to(error, anthropic=_is_anthropic(request))
        except ConnectionError:
            return web.Response()  # the client has gone; writing this ends the connection
        except Exception:
            # Supervision boundary: a fault in one request must be seen, and must not end the connection without an
            # answer. If an answer had begun, the connection is cut instead.
            log.exception("request_failed", path=request.rel_url.raw_path)
            if request.writer.output_size and request.transport is not None:
                request.transport.abort()
            response = error_response(500, "Internal error.", anthropic=_is_anthropic(request))
        if not response.prepared:
            response.headers.setdefault("Server", headers.SERVER)
            if headers.REQUEST_ID not in response.headers:
                response.headers[headers.REQUEST_ID] = headers.request_id(request.headers)
        if self._draining.is_set() and not response.prepared:
            response.force_close()
        return response

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        path, method = request.rel_url.raw_path, request.method
        methods = self._routes.get(path) or self._below(path)
        if methods is None:
            return error_response(404, f"Invalid URL ({method} {path}).", anthropic=_is_anthropic(request))
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            preflight = None if self._cors is None else self._cors.preflight(request, methods)
            if preflight is not None:
                return preflight
            allowed = ", ".join(methods)
            return error_response(
                405, f"Use {allowed} with {path}.", headers={"Allow": allowed}, anthropic=_is_anthropic(request)
            )
        return await handler(request)

    def _below(self, path: str) -> Mapping[str, Handler] | None:
        """The methods of the route that stands for all paths below its own, if there is one for this path."""
        return next(
            (
                each
                for prefix, each in self._routes.items()
                if prefix.endswith("/") and prefix != "/" and path.startswith(prefix)
            ),
            None,
        )


def _is_anthropic(request: web.BaseRequest) -> bool:
    """Whether the client expects errors in the shape of Anthropic's API."""
    path = request.rel_url.raw_path
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")
