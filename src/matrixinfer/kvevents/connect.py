"""Connects ZMQ sockets to engines, by address or by name."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import zmq

LOOKUP_TIMEOUT = 5.0


async def connect(peer: zmq.Socket[bytes], endpoint: str) -> None:
    """Connect `peer` to `tcp://host:port`. Raises `zmq.ZMQError` for a bad endpoint.

    ZMQ tries only the first address of a name, and that is one of IPv6 where IPv6 is allowed. Engines listen on IPv4
    unless told otherwise. So IPv6 is allowed only where the host is not known to have an address of IPv4.
    """
    peer.setsockopt(zmq.IPV6, int(not await _has_ipv4(endpoint)))
    peer.connect(endpoint)


async def _has_ipv4(endpoint: str) -> bool:
    try:
        host = urlsplit(endpoint).hostname
        async with asyncio.timeout(LOOKUP_TIMEOUT):
            await asyncio.get_running_loop().getaddrinfo(host, None, family=socket.AF_INET)
    except (OSError, ValueError, TimeoutError):  # ZMQ says what is wrong with the endpoint
        return False
    return True
