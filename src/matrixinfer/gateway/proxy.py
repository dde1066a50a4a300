"""The data path: one routed request to a pod, and the pod's answer back, as it comes.

Until the first byte of an answer has come, nothing has been sent to the client, so a pod that cannot be reached or
breaks the connection is replaced by the next-ranked one. Status and headers go out together with that first byte: a
stream's headers come at once, its first byte only after the prefill. From then on a failure cuts the client's
connection, so that a truncated answer never looks whole. The client going away cancels the task, which closes the pod's
connection whatever it waits for.
"""

from __future__ import annotations

import asyncio
import io
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import aiohttp
from aiohttp import web
from aiohttp.http import HttpVersion11, StreamWriter
from yarl import URL

from matrixinfer.config import LimitsConfig
from matrixinfer.errors import PodTimeout, PodUnreachable
from matrixinfer.gateway import headers, usage
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from matrixinfer.routing.in_flight import Route

MAX_WHOLE_BYTES = 1024 * 1024
"""Bodies up to this size are read whole and written at once; longer ones, and those of unknown length, stream."""


class _Unreached(Exception):
    """The pod gave no byte of an answer. The message is the kind of failure, as the metrics name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request on its way."""

    request: web.BaseRequest
    id: str
    started: float
    """Seconds on the monotonic clock."""
    route: Route


class Proxy:
    """Forwards requests over one client session. Once `draining` is set, every answer ends its connection."""

    def __init__(
        self, session: aiohttp.ClientSession, metrics: Metrics, limits: LimitsConfig, draining: asyncio.Event
    ) -> None:
        self._session = session
        self._metrics = metrics
        self._limits = limits
        self._draining = draining

    async def forward(self, exchange: Exchange) -> web.StreamResponse:
        """Answer the client from the best pod that can be reached.

        Raises `PodUnreachable` when none could and `PodTimeout` when one is silent too long. Raised after the first
        byte, the client's connection is closed already. Raises `ConnectionError` when the client is gone.
        """
        route = exchange.route
        kind = ""
        pods = route.decision.attempts[: self._limits.max_attempts]
        for attempt, pod in enumerate(pods):
            if attempt:
                self._metrics.retry(kind)
                route.move(pod)
            try:
                with self._metrics.at(pod.name):
                    return await self._attempt(exchange, pod)
            except _Unreached as error:
                kind = str(error)
                self._metrics.upstream_error(pod.name, kind)
                route.failed(pod)
        names = ", ".join(pod.name for pod in pods)
        raise PodUnreachable(f"No pod could be reached (tried {names}; last failure: {kind}).")

    async def _attempt(self, exchange: Exchange, pod: Candidate) -> web.StreamResponse:
        upstream = await self._open(exchange, pod)
        try:
            exchange.route.answered(pod, upstream.status)
            length = _length(exchange, upstream)
            if length is not None and length <= MAX_WHOLE_BYTES:
                body = await self._read(upstream, pod, whole=True)
                self._first_byte(exchange, upstream)
                if _reports(exchange, upstream):
                    _count(exchange, pod, body)
                return self._response(exchange, upstream, pod, body)
            chunk = await self._read(upstream, pod, whole=False)
            self._first_byte(exchange, upstream)
            return await self._stream(exchange, upstream, pod, chunk)
        finally:
            # Nothing happens where the answer was read to its end: its connection is back in the pool.
            upstream.close()

    async def _open(self, exchange: Exchange, pod: Candidate) -> aiohttp.ClientResponse:
        """Send the request and wait for the answer's headers."""
        request = exchange.request
        # Of an absolute-form target (RFC 9112, 3.2.2) only path and query are the pod's.
        url = URL(pod.url + request.rel_url.raw_path_qs, encoded=True)
        body = exchange.route.body_for(pod)
        sent_headers = headers.to_pod(request.headers, exchange.id, pod.rank)
        if exchange.route.injects_usage:
            sent_headers["accept-encoding"] = "identity"  # what is compressed could not be kept from the client
        for fresh in (False, True):
            try:
                return await self._session.post(url, data=_payload(body), headers=sent_headers, allow_redirects=False)
            except aiohttp.ConnectionTimeoutError as error:
                raise _Unreached("connect_timeout") from error
            except aiohttp.ServerTimeoutError as error:
                raise self._silent(pod) from error
            except aiohttp.InvalidURL:
                raise  # a fault of ours, which says nothing about the pod
            except aiohttp.ClientConnectorError as error:
                raise _Unreached("connect") from error
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # A pooled connection may have been closed by the pod while the request was on its way, which says
                # nothing about the pod: once, the same pod is tried again.
                if fresh:
                    raise _Unreached("disconnect") from error
                self._metrics.retry("stale_connection")
            except aiohttp.ClientError as error:
                raise _Unreached("protocol") from error
        raise AssertionError("unreachable: the second failure raises")

    async def _read(self, upstream: aiohttp.ClientResponse, pod: Candidate, *, whole: bool) -> bytes:
        """The first bytes of an answer's body, or all of it."""
        try:
            return await (upstream.content.read() if whole else upstream.content.readany())
        except aiohttp.ServerTimeoutError as error:
            raise self._silent(pod) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Unreached("disconnect") from error

    async def _stream(
        self, exchange: Exchange, upstream: aiohttp.ClientResponse, pod: Candidate, chunk: bytes
    ) -> web.StreamResponse:
        """Pass on an answer of which `chunk` is the beginning; the rest is written as it is read."""
        request = exchange.request
        response = self._response(exchange, upstream, pod, None)
        writer = cast("StreamWriter", await response.prepare(request))
        protocol = request.protocol
        readany = upstream.content.readany
        tail = usage.Tail() if _reports(exchange, upstream) else None
        stripper = usage.Stripper() if _is_stripped(exchange, upstream) else None
        while chunk:
            if tail is not None:
                tail.add(chunk)
            if stripper is not None:
                chunk = stripper.strip(chunk)
            if chunk:
                await writer.write(chunk, drain=False)
            if protocol.writing_paused:
                await self._drain(exchange, writer)
            try:
                chunk = await readany()
            except (aiohttp.ClientError, OSError) as error:
                _cut(request)
                if isinstance(error, aiohttp.ServerTimeoutError):
                    raise self._silent(pod) from error
                self._metrics.upstream_error(pod.name, "broken")
                raise PodUnreachable(f"Pod {pod.name} broke off its answer.") from error
        if tail is not None:
            _count(exchange, pod, bytes(tail))
        if stripper is not None and (chunk := stripper.rest()):
            await writer.write(chunk, drain=False)
        await response.write_eof()
        return response

    async def _drain(self, exchange: Exchange, writer: StreamWriter) -> None:
        """Wait until the client has taken what was written. One that takes nothing for too long is cut off."""
        try:
            async with asyncio.timeout(self._limits.request_timeout_seconds):
                await writer.drain()
        except TimeoutError as error:
            _cut(exchange.request)
            raise ConnectionResetError("the client stopped reading") from error

    def _response(
        self, exchange: Exchange, upstream: aiohttp.ClientResponse, pod: Candidate, body: bytes | None
    ) -> web.StreamResponse:
        """The answer to the client, not yet begun: with its whole body, or to be streamed."""
        passed = headers.to_client(upstream.headers, exchange.id, pod.name)
        status, reason, length = upstream.status, upstream.reason, _length(exchange, upstream)
        if length is None:
            passed.popall("content-length", None)
        response: web.StreamResponse
        if body is None and length is None and exchange.request.version < HttpVersion11:
            response = web.StreamResponse(status=status, reason=reason, headers=passed)
        else:
            # Unlike `StreamResponse`, it sends its headers together with the first byte.
            response = web.Response(status=status, reason=reason, headers=passed, body=body)
            if body is None and length is None:
                response.enable_chunked_encoding()
        if self._draining.is_set():
            response.force_close()
        return response

    def _first_byte(self, exchange: Exchange, upstream: aiohttp.ClientResponse) -> None:
        if upstream.status < 400:  # else the pod refused, and did not compute the prompt
            exchange.route.first_byte()
        self._metrics.first_byte(time.monotonic() - exchange.started)

    def _silent(self, pod: Candidate) -> PodTimeout:
        self._metrics.upstream_error(pod.name, "timeout")
        return PodTimeout(f"Pod {pod.name} sent nothing for {self._limits.request_timeout_seconds:g} s.")


def _payload(body: bytes) -> bytes | io.BytesIO:
    """The body as the client session takes it: written at once, or piece by piece where it is large."""
    return body if len(body) <= MAX_WHOLE_BYTES else io.BytesIO(body)


def _reports(exchange: Exchange, upstream: aiohttp.ClientResponse) -> bool:
    """Whether the answer may tell how many prompt tokens there were, and that is worth knowing."""
    return upstream.status == 200 and "Content-Encoding" not in upstream.headers and exchange.route.wants_usage


def _is_stripped(exchange: Exchange, upstream: aiohttp.ClientResponse) -> bool:
    """Whether the answer is a stream of events from which the report that the gateway asked for is taken out."""
    is_plain = upstream.status == 200 and "Content-Encoding" not in upstream.headers
    return is_plain and exchange.route.injects_usage and upstream.content_type == "text/event-stream"


def _length(exchange: Exchange, upstream: aiohttp.ClientResponse) -> int | None:
    """Bytes of the answer as the client gets it; None where that is not known beforehand."""
    return None if _is_stripped(exchange, upstream) else upstream.content_length


def _count(exchange: Exchange, pod: Candidate, answer: bytes) -> None:
    """Tell what an answer reports at its end, if it does."""
    counted = usage.usage(answer)
    if counted is not None:
        exchange.route.used(pod, counted.prompt, counted.cached)


def _cut(request: web.BaseRequest) -> None:
    """Close a client's connection so that what it got cannot pass for a whole answer."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11:
        # Only the connection's end marks the end of the answer there: reset it instead.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    elif request.protocol.writing_paused:
        transport.abort()
    else:
        transport.close()
