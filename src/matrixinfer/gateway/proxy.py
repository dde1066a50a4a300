"""The data path: a dispatched request to its pod, and the pod's answer back as it comes.

Until the first byte of an answer arrives, nothing has been sent to the client, so a pod that cannot be reached or breaks
the connection is replaced by the next-ranked one. Status and headers go out together with that first byte: engines send
a stream's headers at once, but its first byte only after the prefill. From then on a failure cuts the client's
connection, so that a truncated answer never looks complete. When the client goes away the task is cancelled, which
closes the pod's connection whatever it is waiting for.
"""

from __future__ import annotations

import asyncio
import io
import socket
import struct
import time
from dataclasses import dataclass
from typing import cast

import aiohttp
from aiohttp import web
from aiohttp.http import HttpVersion11, StreamWriter
from yarl import URL

from matrixinfer.config import LimitsConfig
from matrixinfer.errors import PodTimeout, PodUnreachable
from matrixinfer.gateway import headers, usage
from matrixinfer.gateway.rewrite import BodyRewriter, PodBody
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.telemetry.metrics import Metrics

MAX_WHOLE_BYTES = 1024 * 1024
"""Bodies up to this size are read whole and written at once; longer ones and those of unknown length are streamed."""


class _Unreached(Exception):
    """The pod sent no byte of an answer. The message is the kind of failure, as the metrics name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A client's request and where it was dispatched to."""

    request: web.BaseRequest
    id: str
    started: float
    """Seconds on the monotonic clock."""
    in_flight: InFlight


@dataclass(frozen=True, slots=True)
class _Answer:
    """A pod's answer, whose headers have come."""

    exchange: Exchange
    upstream: aiohttp.ClientResponse
    adds_usage: bool
    """The gateway asked for a usage report that the client must not see."""

    @property
    def length(self) -> int | None:
        """Bytes of the body as the client gets it; None when that is not known beforehand."""
        return None if self.is_stripped else self.upstream.content_length

    @property
    def is_stripped(self) -> bool:
        """Whether the usage report that the gateway asked for is taken out of the stream."""
        return self._is_plain and self.adds_usage and self.upstream.content_type == "text/event-stream"

    @property
    def may_report(self) -> bool:
        """Whether the answer may report how many prompt tokens there were, and somebody wants to know."""
        return self._is_plain and self.exchange.in_flight.wants_usage

    @property
    def _is_plain(self) -> bool:
        return self.upstream.status == 200 and "Content-Encoding" not in self.upstream.headers


class Proxy:
    """Forwards requests over one client session. Once `draining` is set, every answer ends its connection."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        rewriter: BodyRewriter,
        metrics: Metrics,
        limits: LimitsConfig,
        draining: asyncio.Event,
    ) -> None:
        self._session = session
        self._rewriter = rewriter
        self._metrics = metrics
        self._limits = limits
        self._draining = draining

    async def forward(self, exchange: Exchange) -> web.StreamResponse:
        """Answer the client from the best pod that can be reached.

        Raises `PodUnreachable` when no pod could be reached and `PodTimeout` when one is silent for too long; after the
        first byte the client's connection is closed already. Raises `ConnectionError` when the client has gone.
        """
        in_flight = exchange.in_flight
        kind = ""
        pods = in_flight.decision.attempts[: self._limits.max_attempts]
        for attempt, pod in enumerate(pods):
            if attempt:
                self._metrics.retry(kind)
                in_flight.move(pod)
            try:
                with self._metrics.at(pod.name):
                    return await self._attempt(exchange)
            except _Unreached as error:
                kind = str(error)
                self._metrics.upstream_error(pod.name, kind)
                in_flight.failed()
        names = ", ".join(pod.name for pod in pods)
        raise PodUnreachable(f"No pod could be reached (tried {names}; last failure: {kind}).")

    async def _attempt(self, exchange: Exchange) -> web.StreamResponse:
        in_flight = exchange.in_flight
        chosen, prepared = in_flight.pod, in_flight.prepared
        body = self._rewriter.body_for(chosen.pod, prepared.prompt, prepared.body, chosen.rank)
        answer = _Answer(exchange, await self._open(exchange, body), body.adds_usage)
        try:
            in_flight.answered(answer.upstream.status)
            length = answer.length
            if length is not None and length <= MAX_WHOLE_BYTES:
                whole = await self._read(answer, whole=True)
                self._first_byte(answer)
                if answer.may_report:
                    _count(exchange, whole)
                return self._response(answer, whole)
            chunk = await self._read(answer, whole=False)
            self._first_byte(answer)
            return await self._stream(answer, chunk)
        finally:
            # Does nothing when the answer was read to its end: its connection is back in the pool.
            answer.upstream.close()

    async def _open(self, exchange: Exchange, body: PodBody) -> aiohttp.ClientResponse:
        """Send the request and wait for the answer's headers."""
        request, pod = exchange.request, exchange.in_flight.pod
        # The client's target may be in absolute form (RFC 9112, 3.2.2): the pod gets its path and query only.
        url = URL(pod.url + request.rel_url.raw_path_qs, encoded=True)
        sent_headers = headers.to_pod(request.headers, exchange.id, body.rank)
        if body.adds_usage:
            sent_headers["accept-encoding"] = "identity"  # the report could not be taken out of a compressed stream
        for fresh in (False, True):
            try:
                return await self._session.post(
                    url, data=_payload(body.bytes), headers=sent_headers, allow_redirects=False
                )
            except aiohttp.ConnectionTimeoutError as error:
                raise _Unreached("connect_timeout") from error
            except aiohttp.ServerTimeoutError as error:
                raise self._silent(pod) from error
            except aiohttp.InvalidURL:
                raise  # our fault; it says nothing about the pod
            except aiohttp.ClientConnectorError as error:
                raise _Unreached("connect") from error
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # The pod may have closed a pooled connection while the request was being sent, which says nothing about
                # the pod: it is tried once more.
                if fresh:
                    raise _Unreached("disconnect") from error
                self._metrics.retry("stale_connection")
            except aiohttp.ClientError as error:
                raise _Unreached("protocol") from error
        raise AssertionError("unreachable: the second failure raises")

    async def _read(self, answer: _Answer, *, whole: bool) -> bytes:
        """The first bytes of an answer's body, or all of it."""
        content = answer.upstream.content
        try:
            return await (content.read() if whole else content.readany())
        except aiohttp.ServerTimeoutError as error:
            raise self._silent(answer.exchange.in_flight.pod) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Unreached("disconnect") from error

    async def _stream(self, answer: _Answer, chunk: bytes) -> web.StreamResponse:
        """Pass on an answer that begins with `chunk`; the rest is written as it is read."""
        exchange, pod = answer.exchange, answer.exchange.in_flight.pod
        request = exchange.request
        response = self._response(answer, None)
        writer = cast("StreamWriter", await response.prepare(request))
        protocol = request.protocol
        readany = answer.upstream.content.readany
        tail = usage.Tail() if answer.may_report else None
        stripper = usage.UsageStripper() if answer.is_stripped else None
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
            _count(exchange, bytes(tail))
        if stripper is not None and (chunk := stripper.rest()):
            await writer.write(chunk, drain=False)
        await response.write_eof()
        return response

    async def _drain(self, exchange: Exchange, writer: StreamWriter) -> None:
        """Wait until the client has read what was written. A client that reads nothing for too long is cut off."""
        try:
            async with asyncio.timeout(self._limits.request_timeout_seconds):
                await writer.drain()
        except TimeoutError as error:
            _cut(exchange.request)
            raise ConnectionResetError("the client stopped reading") from error

    def _response(self, answer: _Answer, body: bytes | None) -> web.StreamResponse:
        """The response to the client, not yet started: with its whole body, or to be streamed."""
        exchange, upstream = answer.exchange, answer.upstream
        passed = headers.to_client(upstream.headers, exchange.id, exchange.in_flight.pod.name)
        status, reason, length = upstream.status, upstream.reason, answer.length
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

    def _first_byte(self, answer: _Answer) -> None:
        if answer.upstream.status < 400:  # otherwise the pod refused, and computed no prompt
            answer.exchange.in_flight.first_byte()
        self._metrics.first_byte(time.monotonic() - answer.exchange.started)

    def _silent(self, pod: Candidate) -> PodTimeout:
        self._metrics.upstream_error(pod.name, "timeout")
        return PodTimeout(f"Pod {pod.name} sent nothing for {self._limits.request_timeout_seconds:g} s.")


def _payload(body: bytes) -> bytes | io.BytesIO:
    """The body as the client session takes it: written at once, or piece by piece when it is large."""
    return body if len(body) <= MAX_WHOLE_BYTES else io.BytesIO(body)


def _count(exchange: Exchange, answer: bytes) -> None:
    """Pass on the usage that an answer reports at its end, if it does."""
    counted = usage.usage(answer)
    if counted is not None:
        exchange.in_flight.usage(counted.prompt, counted.cached)


def _cut(request: web.BaseRequest) -> None:
    """Close a client's connection so that what it received cannot pass for a complete answer."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11:
        # The end of the connection would mark the end of the answer: reset it instead.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    elif request.protocol.writing_paused:
        transport.abort()
    else:
        transport.close()
