"""Listening sockets: those of several processes, those of both IP versions, and the connections that wait at them."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

BACKLOG = 1024
ANY = "::"
"""Stands for all addresses, of IPv4 as well."""


def refuse(listening: asyncio.Server) -> None:
    """Let nobody connect any more, although other processes have this socket, too."""
    for listener in listening.sockets:
        with socket.socket(fileno=os.dup(listener.fileno())) as own, suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)


def open_for_both(port: int) -> socket.socket:
    """A socket that takes connections over IPv6 and IPv4. Raises `OSError`."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server((ANY, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=both)


def accept_waiting(listening: asyncio.Server) -> list[socket.socket]:
    """Connections that the system has made, and that closing the listening socket would reset."""
    found = []
    for listener in listening.sockets:
        with socket.socket(fileno=os.dup(listener.fileno())) as own, suppress(OSError):
            own.setblocking(False)
            while True:
                connection, _ = own.accept()
                connection.setblocking(False)
                found.append(connection)
    return found
