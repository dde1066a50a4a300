"""Listening sockets that several processes share."""

from __future__ import annotations

import socket

from matrixinfer.config import split_address
from matrixinfer.gateway.sockets import BACKLOG


def listening_sockets(address: str, count: int) -> list[socket.socket]:
    """Sockets that share the address of the API, one per worker. Raises `OSError`."""
    host, port = split_address(address, path="$.listen")
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, where = addresses[0]
    found: list[socket.socket] = []
    try:
        with _socket(family, kind, protocol) as probe:  # others of this user could share the address unnoticed
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            where = probe.getsockname()
        for _ in range(count):
            each = _socket(family, kind, protocol)
            found.append(each)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind(where)
            each.listen(BACKLOG)
    except BaseException:
        for each in found:
            each.close()
        raise
    return found


def _socket(family: int, kind: int, protocol: int) -> socket.socket:
    """A socket, which takes IPv4 as well if it is one of IPv6 and the system can."""
    made = socket.socket(family, kind, protocol)
    if family == socket.AF_INET6 and socket.has_dualstack_ipv6():
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return made
