"""Connects ZMQ sockets to engines, by address or by name."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from typing import Any, TypeVar

import zmq

LOOKUP_TIMEOUT = 5.0
FRAMES_QUEUED = 100_000
"""Frames per publisher that ZMQ queues while the subscriber is busy, for example with a replay."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""ZMQ disconnects a peer that sends a longer message, and does not connect to it again."""
RECONNECT_MIN_MS, RECONNECT_MAX_MS = 100, 5_000
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 5_000, 15_000

_Socket = TypeVar("_Socket", bound=zmq.Socket[Any])


class Unresolved(zmq.ZMQError):
    """A host's name has no address yet, or the lookup took too long. Try again later."""


def open_context(max_sockets: int) -> zmq.Context[zmq.Socket[bytes]]:
    """A context whose threads run. ZMQ starts them with the first socket, and ends the process if it has no descriptors then."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, max_sockets)
    context.socket(zmq.PAIR).close(linger=0)
    return context


def subscribe(context: zmq.Context[_Socket], *, queued: int = FRAMES_QUEUED) -> _Socket:
    """An unconnected socket that takes everything from one publisher. Once connected, ZMQ reconnects it by itself."""
    live = context.socket(zmq.SUB)
    live.setsockopt(zmq.RCVHWM, queued)
    live.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    live.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MIN_MS)
    live.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    # A subscriber sends nothing, so without heartbeats it would wait on a dead connection forever.
    live.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    live.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    live.setsockopt(zmq.SUBSCRIBE, b"")
    return live


async def connect(peer: zmq.Socket[Any], endpoint: str) -> None:
    """Connect `peer` to `tcp://host:port` or `ipc://path`.

    ZMQ tries only the first address of a name, which is an IPv6 address where IPv6 is allowed, but engines listen on
    IPv4 by default. So IPv6 is allowed only if the name resolves to no IPv4 address. Raises `Unresolved` if the name
    does not resolve, and another `zmq.ZMQError` for a bad endpoint.
    """
    peer.setsockopt(zmq.IPV6, int(await _needs_ipv6(endpoint)))
    peer.connect(endpoint)


async def _needs_ipv6(endpoint: str) -> bool:
    transport, _, address = endpoint.partition("://")
    host = address.rpartition(";")[2].rpartition(":")[0].strip("[]")  # ZMQ also takes `source;destination`
    if transport != "tcp" or not host:  # a path; or a bad endpoint, which ZMQ reports
        return False
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return socket.AF_INET not in await _families(host)


async def _families(name: str) -> set[socket.AddressFamily]:
    """The address families that a name resolves to: at least one."""
    try:
        async with asyncio.timeout(LOOKUP_TIMEOUT):
            found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # a timeout is an OSError
        raise Unresolved(errno.EHOSTUNREACH, f"the name `{name}` does not resolve") from error
    return {socket.AddressFamily(family) for family, *_ in found}
