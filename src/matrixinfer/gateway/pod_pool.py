"""The connections to pods: idle ones are kept for a while, new ones are opened within a deadline."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final, TypeAlias

from aiohappyeyeballs import AddrInfoType, start_connection
from aiohttp.abc import ResolveResult
from yarl import URL

from matrixinfer.errors import Overloaded, shortage_in
from matrixinfer.gateway.pod_connection import AttemptFailed, PodConnection
from matrixinfer.pods.engine_tls import Trust
from matrixinfer.pods.resolver import Resolver
from matrixinfer.pods.session import IDLE_SECONDS

TrustAt: TypeAlias = Callable[[str | None, int | None], Trust]

_STAGGER_SECONDS: Final = 0.25
"""Delay after which the next address of a host is tried as well (RFC 8305, 5)."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a pod listens. It is read from the pod's URL once."""

    host: str
    port: int
    is_secure: bool
    authority: str
    """What `Host` says."""
    prefix: str
    """The path of the URL, which comes before the path of every request."""


@lru_cache(maxsize=4096)
def origin_of(url: str) -> Origin:
    """The origin of a pod's URL. Raises `ValueError` if that names no host."""
    parsed = URL(url)
    if not parsed.raw_host:
        raise ValueError("the URL names no host")
    return Origin(
        host=parsed.raw_host,
        port=parsed.port or 0,
        is_secure=parsed.scheme == "https",
        authority=parsed.host_port_subcomponent or "",
        prefix=parsed.raw_path.rstrip("/"),
    )


class PodPool:
    """Opens connections and keeps the idle ones. Their number is not limited: the scheduler limits what is in flight.

    `on_shortage` is called when this process cannot connect, whatever the pod. `trust_at` says how to reach the pod at a
    host and port by TLS.
    """

    def __init__(self, connect_seconds: float, on_shortage: Callable[[str, str], None], trust_at: TrustAt) -> None:
        self._trust_at = trust_at
        self.connect_seconds = connect_seconds
        self._on_shortage = on_shortage
        self._resolver = Resolver()
        self._idle: dict[Origin, deque[tuple[float, PodConnection]]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False

    def reuse(self, origin: Origin) -> PodConnection | None:
        """The connection that has been idle for the shortest time; None if there is none."""
        idle = self._idle.get(origin)
        oldest = asyncio.get_running_loop().time() - IDLE_SECONDS
        while idle:
            since, connection = idle.pop()
            if connection.is_open and since > oldest:
                return connection
            connection.close()
        return None

    async def connect(self, origin: Origin) -> PodConnection:
        """A new connection. Raises `AttemptFailed`, and `Overloaded` when this process is short of something."""
        loop = asyncio.get_running_loop()
        trust = self._trust_at(origin.host, origin.port) if origin.is_secure else None
        try:
            async with asyncio.timeout(self.connect_seconds):
                opened = await self._open(loop, origin)
                _, connection = await loop.create_connection(
                    partial(PodConnection, loop, partial(self._keep, origin)),
                    sock=opened,
                    ssl=None if trust is None else trust.context,
                    server_hostname=None if trust is None else trust.server_name or origin.host,
                )
        except TimeoutError as error:
            raise AttemptFailed("connect_timeout", was_sent=False) from error
        except (OSError, RuntimeError) as error:  # the latter by uvloop, for several addresses that failed differently
            shortage = shortage_in(error)
            if shortage is not None:
                self._on_shortage("requests", f"cannot connect to a pod: {shortage}")
                raise Overloaded("The gateway has no free file descriptor, port or memory.") from error
            raise AttemptFailed("connect", was_sent=False) from error
        return connection

    def close(self) -> None:
        """Close what is idle; connections in use close when their requests end."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for idle in self._idle.values():
            for _, connection in idle:
                connection.close()
        self._idle.clear()

    def forget(self, origin: Origin) -> None:
        """Close the idle connections to a pod that has gone."""
        for _, connection in self._idle.pop(origin, ()):
            connection.close()

    async def _open(self, loop: asyncio.AbstractEventLoop, origin: Origin) -> socket.socket:
        """A connected socket. A host's addresses are tried one after the other, each before the last has failed."""
        found = await self._resolver.resolve(origin.host, origin.port, socket.AF_UNSPEC)
        opened = await start_connection(
            [_address(each) for each in found], happy_eyeballs_delay=_STAGGER_SECONDS, loop=loop
        )
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened

    def _keep(self, origin: Origin, connection: PodConnection) -> None:
        if self._is_closed:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        idle = self._idle.get(origin)
        if idle is None:
            idle = self._idle[origin] = deque()
        idle.append((loop.time(), connection))
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for too long, before the engine does."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE_SECONDS
        for origin, idle in list(self._idle.items()):
            while idle and (idle[0][0] <= oldest or not idle[0][1].is_open):
                idle.popleft()[1].close()
            if not idle:
                del self._idle[origin]
        self._sweeper = loop.call_later(IDLE_SECONDS / 4, self._sweep) if self._idle else None


def _address(found: ResolveResult) -> AddrInfoType:
    host, port = found["host"], found["port"]
    where = (host, port, 0, 0) if found["family"] == socket.AF_INET6 else (host, port)
    return found["family"], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", where


@lru_cache(maxsize=1)
def _system() -> ssl.SSLContext:
    return ssl.create_default_context()


def system_trust(_host: str | None, _port: int | None) -> Trust:
    """Believe whom the system believes."""
    return Trust(_system(), None)
