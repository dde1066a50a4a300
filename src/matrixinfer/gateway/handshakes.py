"""Accepts TLS connections, whose handshakes count against the bound on connections.

The event loop's own servers show a connection only when its handshake is done: clients that connect and say nothing would
take every file descriptor of the process.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl

import structlog

from matrixinfer.errors import shortage_in
from matrixinfer.gateway.connection import Server
from matrixinfer.gateway.sockets import BACKLOG
from matrixinfer.tasks import cancel_all

_REST_SECONDS = 1.0
"""How long no connection is accepted after the system could not make one."""

log = structlog.get_logger(__name__)


class Handshakes:
    """Has `server` serve each connection once its handshake is done, which takes at most `seconds`.

    Where there is no room, the one that has taken longest is broken off: most clients take an instant.
    """

    def __init__(self, server: Server, context: ssl.SSLContext, seconds: float) -> None:
        self._server = server
        self._context = context
        self._seconds = seconds
        self._listening: dict[asyncio.Server, list[socket.socket]] = {}
        self._pending: dict[asyncio.Task[None], socket.socket] = {}

    def listen(self, listening: asyncio.Server) -> None:
        """Accept connections at the sockets of a server that does not do so itself."""
        own = self._listening[listening] = [socket.socket(fileno=os.dup(each.fileno())) for each in listening.sockets]
        for each in own:
            each.setblocking(False)
            each.listen(BACKLOG)
            self._watch(each)

    def leave(self, listening: asyncio.Server) -> None:
        """Accept no more connections there. Does nothing if it has done so already."""
        for each in self._listening.pop(listening, ()):
            asyncio.get_running_loop().remove_reader(each.fileno())
            each.close()

    def take(self, connection: socket.socket) -> None:
        """Begin the handshake of a connection that was accepted just now."""
        task = asyncio.create_task(self._shake(connection), name="tls handshake")
        self._pending[task] = connection
        task.add_done_callback(lambda done: self._pending.pop(done, None))
        most, oldest = self._server.max_connections, next(iter(self._pending))
        if most is None or oldest is task or len(self._pending) + len(self._server.connections) <= most:
            return
        if self._server.noted("connections_refused"):
            log.warning("connections_refused", limit=most)
        del self._pending[oldest]
        oldest.cancel()

    async def finish(self, seconds: float) -> None:
        """Wait for those that have begun, at most for some time, and break off the others."""
        if self._pending:
            await asyncio.wait(tuple(self._pending), timeout=seconds)
        await cancel_all(self._pending)

    async def _shake(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self._server, connection, ssl=self._context, ssl_handshake_timeout=self._seconds
            )
        except (OSError, asyncio.CancelledError):  # TLS errors and timeouts are kinds of the former
            connection.close()

    def _watch(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(BACKLOG):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # the system has nothing left for it
                if self._server.noted("resources_ran_out"):
                    log.warning("resources_ran_out", place="clients", reason=shortage_in(error) or error.strerror)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener.fileno())
                loop.call_later(_REST_SECONDS, self._watch, listener)
                return
            connection.setblocking(False)
            self.take(connection)
