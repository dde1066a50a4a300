"""The data path: a dispatched request to its pod, and the pod's answer back as it comes.

Until the first byte of an answer arrives, nothing has been sent to the client, so a pod that refuses, cannot be reached,
breaks the connection or goes down is replaced by the next-ranked one, as far as `Retry` allows. Status and headers go out
together with that first byte: engines send a stream's headers at once, but its first byte only after the prefill. From
then on a failure cuts the client's connection, so that a truncated answer never looks complete. When the client goes
away the task is cancelled, which closes the pod's connection whatever it is waiting for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import NoReturn, cast

from aiohttp import web
from aiohttp.http import StreamWriter

from matrixinfer.config import LimitsConfig
from matrixinfer.errors import PodTimeout, PodUnreachable
from matrixinfer.gateway import headers
from matrixinfer.gateway.answer import Answer, Exchange, Passage, cut
from matrixinfer.gateway.credentials import Credentials
from matrixinfer.gateway.deadlines import Deadlines
from matrixinfer.gateway.heads import PodResponse
from matrixinfer.gateway.keep_alive import COMMENT, KeepAlive, read_within
from matrixinfer.gateway.pod_connection import AttemptFailed, PodAnswer
from matrixinfer.gateway.retries import Retries, Retry
from matrixinfer.gateway.rewrite import BodyRewriter, PodBody
from matrixinfer.gateway.token_ids import REFUSALS, TokenIdSender
from matrixinfer.gateway.unless_down import UnlessDown
from matrixinfer.gateway.upstream import MAX_WHOLE_BYTES, Upstream
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.telemetry.metrics import Metrics

_MAX_REFUSAL_BYTES = 64 * 1024
"""A refusal whose body is longer, or of unknown length, is not kept while other pods are tried."""

_FIRST_ERROR = 400
_ALWAYS = nullcontext()


class _Refused(Exception):
    """The pod answered with a status that another pod may spare the client. `response` would pass it on."""

    def __init__(self, response: web.StreamResponse | None, status: int) -> None:
        super().__init__(str(status))
        self.response = response
        self.status = status


class _IdsRefused(Exception):
    """The pod answered a request with token ids as if it were malformed. It may not be without them."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


class Proxy:
    """Forwards requests over one client session. Once `draining` is set, every answer ends its connection."""

    def __init__(
        self,
        upstream: Upstream,
        retries: Retries,
        rewriter: BodyRewriter,
        metrics: Metrics,
        limits: LimitsConfig,
        draining: asyncio.Event,
        credentials: Credentials,
        keep_alive_seconds: float | None = None,
        token_ids: TokenIdSender | None = None,
    ) -> None:
        self._token_ids = token_ids
        self._credentials = credentials
        self._keep_alive_seconds = keep_alive_seconds
        self._upstream = upstream
        self._retries = retries
        self._rewriter = rewriter
        self._metrics = metrics
        self._limits = limits
        self._deadlines = Deadlines(limits.request_timeout_seconds)
        self._draining = draining

    def reconfigure(self, limits: LimitsConfig) -> None:
        """Keep these limits from the next request on."""
        self._limits = limits
        self._deadlines = Deadlines(limits.request_timeout_seconds)
        self._upstream.reconfigure(limits)

    async def forward(self, exchange: Exchange) -> web.StreamResponse:
        """Answer the client from the best pod that can be reached, within the request's time limit.

        Raises `PodUnreachable` when no pod answered and `PodTimeout` when one is silent, or answers, for too long; after the
        first byte the client's connection is closed already. Raises `ConnectionError` when the client has gone.
        """
        deadlines = self._deadlines
        deadline = deadlines.begin()
        try:
            with deadline:
                return await self._try_pods(exchange)
        except TimeoutError as error:
            if not deadline.has_passed:
                raise
            self._metrics.upstream_error(exchange.in_flight.pod.name, "timeout")
            if exchange.has_begun:
                cut(exchange.request)  # the answer is long, or its client slow: no fault of the pod
            else:
                exchange.in_flight.timed_out()
            within = f"{deadlines.seconds:g} s"
            raise PodTimeout(f"Pod {exchange.in_flight.pod.name} sent no whole answer within {within}.") from error

    async def _try_pods(self, exchange: Exchange) -> web.StreamResponse:
        in_flight, retry = exchange.in_flight, self._retries.begin()
        refusal: web.StreamResponse | None = None
        tried: list[str] = []
        kind = ""
        pod: Candidate | None = in_flight.pod
        while pod is not None:
            if tried:
                self._metrics.retry(kind)
                await retry.pause()
                in_flight.move(pod)
            tried.append(pod.name)
            may_move = len(tried) < self._limits.max_attempts
            try:
                with self._metrics.at(pod.name):
                    return await self._attempt(exchange, retry, may_move=may_move)
            except _Refused as error:
                kind, refusal = str(error), error.response
                if exchange.trace is not None:
                    exchange.trace.refused(error.status)
            except AttemptFailed as error:
                kind = error.kind
                self._metrics.upstream_error(pod.name, kind)
                in_flight.failed(kind)
                if exchange.trace is not None:
                    exchange.trace.failed(kind)
                if not may_move or in_flight.following() is None or not retry.after_failure(error):
                    break
            pod = in_flight.following()
        if refusal is not None:
            return refusal
        if kind == "timeout":
            raise PodTimeout(f"Pod {tried[-1]} sent nothing for {self._limits.first_byte_timeout_seconds:g} s.")
        raise PodUnreachable(f"No pod answered (tried {', '.join(tried)}; last failure: {kind}).")

    async def _attempt(self, exchange: Exchange, retry: Retry, *, may_move: bool) -> web.StreamResponse:
        in_flight, sender = exchange.in_flight, self._token_ids
        if sender is None:
            return await self._send(exchange, retry, in_flight.prepared.body, may_move=may_move)
        body = await sender.body_for(in_flight, exchange.held)
        in_flight.sends_ids(sends=body is not None)
        if body is not None:
            try:
                return await self._send(exchange, retry, body, may_move=may_move, has_ids=True)
            except _IdsRefused as error:
                if exchange.trace is not None:
                    exchange.trace.refused(error.status)
            in_flight.sends_ids(sends=False)
        response = await self._send(exchange, retry, in_flight.prepared.body, may_move=may_move)
        if body is not None and response.status < _FIRST_ERROR:
            sender.refused(in_flight)  # without the ids it is well-formed
        return response

    async def _send(
        self, exchange: Exchange, retry: Retry, data: bytes, *, may_move: bool, has_ids: bool = False
    ) -> web.StreamResponse:
        """Send a body to the pod, rewritten for it, and pass its answer on. `has_ids` may raise `_IdsRefused`."""
        in_flight = exchange.in_flight
        chosen, prompt = in_flight.pod, in_flight.prepared.prompt
        adds_usage = exchange.ticket is not None and exchange.ticket.wants_usage
        body = self._rewriter.body_for(chosen.pod, prompt, data, chosen.rank, adds_usage=adds_usage)
        with UnlessDown(in_flight) if may_move and retry.may_send_again else _ALWAYS:
            answer = Answer(exchange, await self._open(exchange, body, once=retry.was_sent), body)
            try:
                status = answer.upstream.status
                if has_ids:
                    _check(status)
                is_error = status >= _FIRST_ERROR
                in_flight.answered(status, headers.retry_after(answer.upstream.headers) if is_error else None)
                if is_error and may_move and self._may_refuse(in_flight, retry, status):
                    await self._refuse(answer)
                length = None if answer.is_stripped else answer.upstream.content_length
                is_whole = length is not None and length <= MAX_WHOLE_BYTES
                first = await (answer.upstream.read() if is_whole else self._first(answer))
            except BaseException:
                answer.upstream.close()
                raise
        try:
            if first is not None:
                self._first_byte(answer)
            if first is None or not is_whole:
                return await self._stream(answer, first)
            passage = Passage(answer, is_whole=True)
            first = passage.change(first)
            return self._response(answer, first + passage.end())
        finally:
            # Does nothing when the answer was read to its end: its connection is back in the pool.
            answer.upstream.close()

    async def _first(self, answer: Answer) -> bytes | None:
        """The first bytes of a stream; None if its pod is silent for so long that the client needs a sign of life."""
        if self._keep_alive_seconds is None or not answer.is_events:
            return await answer.upstream.readany()
        return await read_within(self._keep_alive_seconds, answer.upstream.readany)

    @staticmethod
    def _may_refuse(in_flight: InFlight, retry: Retry, status: int) -> bool:
        """Whether the answer is not passed on, as another endpoint may have a better one."""
        if in_flight.following() is None:
            return False
        return retry.after_status(status, needs_witness=in_flight.needs_witness)

    async def _open(self, exchange: Exchange, body: PodBody, *, once: bool) -> PodAnswer:
        """Send the request and wait for the answer's headers. Raises `AttemptFailed`."""
        request, pod = exchange.request, exchange.in_flight.pod
        sent_headers = headers.to_pod(request.headers, exchange.id, body.rank)
        self._credentials.apply(
            sent_headers, pod.url, is_authenticated=exchange.ticket is not None and exchange.ticket.is_authenticated
        )
        if body.adds_usage or body.renamed is not None:
            sent_headers["accept-encoding"] = "identity"  # a compressed answer could not be changed
        if exchange.trace is not None:
            exchange.trace.sent(exchange.in_flight, sent_headers)
        # The client's target may be in absolute form (RFC 9112, 3.2.2): the pod gets its path and query only.
        target = request.rel_url.raw_path_qs
        return await self._upstream.send(request.method, pod.url, target, body.bytes, sent_headers, once=once)

    async def _refuse(self, answer: Answer) -> NoReturn:
        """Keep the answer for the case that no other pod answers, unless it is too long."""
        length, kept = answer.upstream.content_length, None
        if length is not None and length <= _MAX_REFUSAL_BYTES:
            kept = self._response(answer, await answer.upstream.read())
        raise _Refused(kept, answer.upstream.status)

    async def _stream(self, answer: Answer, chunk: bytes | None) -> web.StreamResponse:
        """Pass on an answer that begins with `chunk`; the rest is written as it is read.

        None stands for a pod that is still silent: the answer begins with a comment, and can go to no other pod.
        """
        exchange, has_first = answer.exchange, chunk is not None
        request = exchange.request
        response = self._response(answer, None)
        if has_first:
            answer.upstream.limit_silence(self._limits.idle_timeout_seconds)
        exchange.has_begun = True
        writer = cast("StreamWriter", await response.prepare(request))
        protocol = request.protocol

        async def write(data: bytes) -> None:
            await writer.write(data, drain=False)
            if protocol.writing_paused:
                await self._drain(exchange, writer)

        keep_alive = None
        if self._keep_alive_seconds is not None and answer.is_events:
            keep_alive = KeepAlive(self._keep_alive_seconds, answer.upstream.readany, write)
        read = answer.upstream.readany if keep_alive is None else keep_alive.read
        if chunk is None:
            await write(COMMENT)
            chunk = await self._first_after(answer, read)
            self._first_byte(answer)
            answer.upstream.limit_silence(self._limits.idle_timeout_seconds)
        passage = Passage(answer, is_whole=False)
        while chunk:
            chunk = passage.change(chunk)
            if chunk:
                await writer.write(chunk, drain=False)
            if protocol.writing_paused:
                await self._drain(exchange, writer)
            if keep_alive is not None:
                keep_alive.passed(chunk)
            try:
                chunk = await read()
            except AttemptFailed as error:
                raise self._broken(answer, error) from error
        if rest := passage.end():
            await writer.write(rest, drain=False)
        await response.write_eof()
        return response

    async def _first_after(self, answer: Answer, read: Callable[[], Awaitable[bytes]]) -> bytes:
        """The first bytes of a stream whose client has got a comment already."""
        try:
            return await read()
        except AttemptFailed as error:
            raise self._broken(answer, error, has_first=False) from error

    def _broken(self, answer: Answer, error: AttemptFailed, *, has_first: bool = True) -> PodTimeout | PodUnreachable:
        """A pod has failed in the middle of its answer: cut the client's connection. Returns what to raise."""
        exchange = answer.exchange
        cut(exchange.request)
        pod, kind = exchange.in_flight.pod.name, "timeout" if error.kind == "timeout" else "broken"
        self._metrics.upstream_error(pod, kind)
        exchange.in_flight.broke(kind)
        if kind == "broken":
            return PodUnreachable(f"Pod {pod} broke off its answer.")
        limits = self._limits
        seconds = limits.idle_timeout_seconds if has_first else limits.first_byte_timeout_seconds
        return PodTimeout(f"Pod {pod} sent nothing for {seconds:g} s.")

    async def _drain(self, exchange: Exchange, writer: StreamWriter) -> None:
        """Wait until the client has read what was written. A client that reads nothing for too long is cut off."""
        try:
            async with asyncio.timeout(self._limits.idle_timeout_seconds):
                await writer.drain()
        except TimeoutError as error:
            cut(exchange.request)
            raise ConnectionResetError("the client stopped reading") from error

    def _response(self, answer: Answer, body: bytes | None) -> web.StreamResponse:
        """The response to the client, not yet started: with its whole body, or to be streamed."""
        exchange, upstream = answer.exchange, answer.upstream
        passed = headers.to_client(upstream.headers, exchange.id, exchange.in_flight.pod.name)
        if exchange.ticket is not None:
            passed.update(exchange.ticket.headers)
        status, reason, length = upstream.status, upstream.reason, answer.length
        if length is None or (body is not None and len(body) != length):
            passed.popall("content-length", None)
        response = PodResponse(status, reason, passed, body)
        if self._draining.is_set():
            response.force_close()
        return response

    def _first_byte(self, answer: Answer) -> None:
        answer.exchange.first_byte_at = now = time.monotonic()
        seconds = now - answer.exchange.started
        if answer.upstream.status < 400:  # otherwise the pod refused, and computed no prompt
            answer.exchange.in_flight.first_byte(seconds)
            if answer.exchange.ticket is not None:
                answer.exchange.ticket.served()
        self._metrics.first_byte(seconds)
        if answer.exchange.trace is not None:
            answer.exchange.trace.first_byte(now)


def _check(status: int) -> None:
    """Raise `_IdsRefused` for an answer that may be due to token ids."""
    if status in REFUSALS:
        raise _IdsRefused(status)
