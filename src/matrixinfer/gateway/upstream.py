"""Sends a request to a pod and waits for the headers of the answer. When that fails, it says how far the request got.

An engine closes idle connections, and may do so just while a request is being sent on one. That says nothing about the
engine, so the request is sent to it once more, on a new connection. Whether a connection was new is known from the
client library, not guessed. When a new one breaks after the request went out, the request itself may have broken the
engine, so whoever sends it to another pod must know: `AttemptFailed.was_sent`.
"""

from __future__ import annotations

import asyncio
import errno
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

import aiohttp
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

from matrixinfer.config import LimitsConfig
from matrixinfer.errors import MatrixInferError, Overloaded
from matrixinfer.gateway.resolver import Resolver
from matrixinfer.gateway.session import IDLE_SECONDS, client_options
from matrixinfer.telemetry.metrics import Metrics

MAX_WHOLE_BYTES = 1024 * 1024
"""Bodies up to this size are written at once, longer ones piece by piece."""

_BUFFERED_BYTES = 32 * 1024
"""Smaller bodies are handed to the system without waiting."""

_OWN_ERRORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))
"""Errors of a connection that are this machine's fault, not the pod's."""

FailureKind: TypeAlias = Literal["connect", "connect_timeout", "disconnect", "protocol", "timeout", "went_down"]


class AttemptFailed(MatrixInferError):
    """The pod sent no byte of an answer. `was_sent`: it may have read the request."""

    def __init__(self, kind: FailureKind, *, was_sent: bool) -> None:
        super().__init__(kind)
        self.kind = kind
        self.was_sent = was_sent


_is_reused: ContextVar[bool] = ContextVar("is_reused", default=False)
"""Whether the connection of this task's request has served an earlier one."""


class _Connector(aiohttp.TCPConnector):
    """Keeps connections, and tells those that it has handed out before from new ones.

    The library's tracing says the same, for ten times the cost of a request.
    """

    def __init__(self, resolver: Resolver) -> None:
        super().__init__(limit=0, keepalive_timeout=IDLE_SECONDS, resolver=resolver)
        self._served: WeakSet[object] = WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the library's signature
    ) -> Connection:
        """A connection for `req`."""
        _is_reused.set(False)
        connection = await super().connect(req, traces, timeout)
        protocol = connection.protocol
        if protocol in self._served:
            _is_reused.set(True)
        else:
            self._served.add(protocol)
        return connection


class Upstream:
    """Sends requests to pods, on connections that are kept (`pooled`) or that serve one request (`fresh`)."""

    def __init__(
        self, pooled: aiohttp.ClientSession, fresh: aiohttp.ClientSession, metrics: Metrics, seconds: float
    ) -> None:
        """An answer's headers must come within `seconds`."""
        self._pooled = pooled
        self._fresh = fresh
        self._metrics = metrics
        self._seconds = seconds

    async def open(self, url: URL, body: bytes, headers: CIMultiDict[str]) -> aiohttp.ClientResponse:
        """The answer, whose headers have come. Raises `AttemptFailed`, and `Overloaded` when this process is short of something."""
        try:
            return await self._post(self._pooled, url, body, headers)
        except AttemptFailed as error:
            if error.kind != "disconnect" or not _is_reused.get():
                raise
        self._metrics.retry("stale_connection")
        try:
            return await self._post(self._fresh, url, body, headers)
        except AttemptFailed as error:
            # Perhaps the first connection broke because the request broke the engine.
            raise AttemptFailed(error.kind, was_sent=True) from error

    async def _post(
        self,
        session: aiohttp.ClientSession,
        url: URL,
        body: bytes,
        headers: CIMultiDict[str],
    ) -> aiohttp.ClientResponse:
        payload = body if len(body) <= MAX_WHOLE_BYTES else io.BytesIO(body)
        try:
            # The library measures silence only once the whole body is sent, and a pod may never read a large one.
            async with asyncio.timeout(self._seconds if len(body) > _BUFFERED_BYTES else None):
                answer = await session.post(url, data=payload, headers=headers, allow_redirects=False)
        except aiohttp.ConnectionTimeoutError as error:
            raise AttemptFailed("connect_timeout", was_sent=False) from error
        except TimeoutError as error:
            raise AttemptFailed("timeout", was_sent=True) from error
        except aiohttp.InvalidURL:
            raise  # our fault; it says nothing about the pod
        except aiohttp.ClientConnectorError as error:
            if error.os_error.errno in _OWN_ERRORS:
                raise Overloaded("The gateway has no free file descriptor or port.") from error
            raise AttemptFailed("connect", was_sent=False) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            raise AttemptFailed("disconnect", was_sent=True) from error
        except aiohttp.ClientError as error:
            raise AttemptFailed("protocol", was_sent=True) from error
        if answer.status < 200:  # such as 101: the engine now speaks another protocol, which nobody asked for
            answer.close()
            raise AttemptFailed("protocol", was_sent=True)
        return answer


@asynccontextmanager
async def upstream(limits: LimitsConfig, metrics: Metrics) -> AsyncIterator[Upstream]:
    """Open the connections to the pods. Their number is not limited: the scheduler limits what is in flight."""
    resolver, options = Resolver(), client_options(limits)
    once = aiohttp.TCPConnector(limit=0, force_close=True, resolver=resolver)
    async with (
        aiohttp.ClientSession(connector=_Connector(resolver), **options) as pooled,
        aiohttp.ClientSession(connector=once, **options) as fresh,
    ):
        yield Upstream(pooled, fresh, metrics, limits.first_byte_timeout_seconds)
