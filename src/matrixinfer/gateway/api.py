"""The paths of the API: a request is identified, read, dispatched, answered and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import structlog
from aiohttp import web

from matrixinfer.access.demand import Demand
from matrixinfer.access.gate import CLIENT_GONE, Gate, Ticket
from matrixinfer.errors import MatrixInferError
from matrixinfer.gateway import headers
from matrixinfer.gateway.access_log import RequestLog
from matrixinfer.gateway.answer import Exchange
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.errors import code_of, response_to
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.proxy import Proxy
from matrixinfer.gateway.response_ids import ResponseId
from matrixinfer.prompt.anthropic import MESSAGES_PATH
from matrixinfer.prompt.memory import Held
from matrixinfer.prompt.requests import READERS, Reader
from matrixinfer.prompt.responses import RESPONSES_PATH
from matrixinfer.routing.router import Router
from matrixinfer.routing.stored_responses import StoredResponses
from matrixinfer.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from matrixinfer.gateway.request_trace import RequestTrace, RequestTraces  # needs an extra

Answerer: TypeAlias = Callable[[web.BaseRequest, bytes, str, Ticket | None], Awaitable[web.StreamResponse]]
"""Answers a request by its body, its id and the caller's ticket. May raise `MatrixInferError`."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Progress:
    """How far a request has come. Whatever ends it, this is what is counted and logged."""

    id: str
    session: str | None
    started: float
    """Seconds on the monotonic clock."""
    ticket: Ticket | None = None
    body_read: float | None = None
    """When the body was complete."""
    exchange: Exchange | None = None
    """Set once the request is dispatched."""
    trace: RequestTrace | None = None
    code: int = 500
    reason: str | None = "internal"
    """Why the gateway refused the request; None if it did not."""


class Api:
    """The APIs that engines offer: OpenAI's, Anthropic's messages, scores and rankings."""

    def __init__(
        self,
        router: Router,
        proxy: Proxy,
        metrics: Metrics,
        bodies: Bodies,
        request_log: RequestLog | None = None,
        gate: Gate | None = None,
        stored: StoredResponses | None = None,
        traces: RequestTraces | None = None,
    ) -> None:
        self._traces = traces
        self._gate = gate
        self._stored = StoredResponses() if stored is None else stored
        self._router = router
        self._proxy = proxy
        self._metrics = metrics
        self._bodies = bodies
        self._request_log = request_log

    def routes(self) -> Routes:
        """Paths of the API."""
        return {path: {"POST": self.dispatch} for path in READERS}

    async def dispatch(self, request: web.BaseRequest, read: Reader | None = None) -> web.StreamResponse:
        """Dispatch a request, and pass its answer on. `read` reads a body that brings no prompt."""
        return await self._counted(request, partial(self._answer, request, read))

    async def apart(self, request: web.BaseRequest, answer: Answerer) -> web.StreamResponse:
        """Have `answer` handle a request that is not dispatched to one pod. It is admitted, counted and logged like others."""
        return await self._counted(request, partial(self._apart, request, answer))

    async def _counted(
        self, request: web.BaseRequest, answer: Callable[[Held, _Progress], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        progress = _Progress(
            headers.request_id(request.headers), headers.session_id(request.headers), started=time.monotonic()
        )
        if self._traces is not None:
            progress.trace = self._traces.begin(request, progress.id, progress.started)
        held = self._bodies.hold()
        try:
            response = await answer(held, progress)
            progress.code, progress.reason = response.status, None
        except MatrixInferError as error:
            response = response_to(error, anthropic=request.path.startswith(MESSAGES_PATH))
            response.headers[headers.REQUEST_ID] = progress.id
            progress.code, progress.reason = response.status, code_of(error)
            if not request.content.is_eof():
                response.force_close()  # the rest of the body is not read
        except (asyncio.CancelledError, ConnectionError):
            progress.code, progress.reason = CLIENT_GONE, None
            raise
        finally:
            held.release()
            self._ended(request.path, progress)
        return response

    async def _read(self, request: web.BaseRequest, held: Held, progress: _Progress, *, is_text: bool) -> bytes:
        """Identify the caller, then read the body."""
        if self._gate is not None:
            progress.ticket = self._gate.ticket(await self._gate.identify(request.headers))
        body = await self._bodies.read(request, held, is_text=is_text)
        progress.body_read = time.monotonic()
        return body

    async def _apart(
        self, request: web.BaseRequest, answer: Answerer, held: Held, progress: _Progress
    ) -> web.StreamResponse:
        body = await self._read(request, held, progress, is_text=True)
        ticket = progress.ticket
        if ticket is not None:
            await ticket.admit(Demand(0, 0, generates=False, body=body))
        response = await answer(request, body, progress.id, ticket)
        response.headers[headers.REQUEST_ID] = progress.id
        if ticket is not None:
            response.headers.update(ticket.headers)
            if response.status < 300:
                ticket.served()
        return response

    async def _answer(
        self, request: web.BaseRequest, read: Reader | None, held: Held, progress: _Progress
    ) -> web.StreamResponse:
        body = await self._read(request, held, progress, is_text=read is None)
        path = request.rel_url.raw_path
        async with self._router.dispatch(
            path,
            body,
            request_id=progress.id,
            session=progress.session,
            ticket=progress.ticket,
            read=read,
            headers=request.headers,
            stages=progress.trace,
        ) as in_flight:
            exchange = progress.exchange = Exchange(
                request=request,
                id=progress.id,
                started=progress.started,
                in_flight=in_flight,
                ticket=progress.ticket,
                counts_events=self._request_log is not None,
                trace=progress.trace,
                held=held,
            )
            if path == RESPONSES_PATH:
                tenant = None if progress.ticket is None else progress.ticket.tenant
                exchange.response_id = ResponseId(partial(self._stored.remember, tenant=tenant))
            return await self._proxy.forward(exchange)

    def _ended(self, path: str, progress: _Progress) -> None:
        """Settle what the request was promised, and count and log it."""
        ticket, exchange, code = progress.ticket, progress.exchange, progress.code
        if ticket is not None:
            ticket.close(code)
        model = None if exchange is None else exchange.in_flight.decision.request.model
        pod = None if exchange is None else exchange.in_flight.pod.name
        seconds = time.monotonic() - progress.started
        self._metrics.request(model, code, seconds)
        log.debug("request_ended", id=progress.id, path=path, model=model, pod=pod, code=code, seconds=seconds)
        if progress.trace is not None:
            progress.trace.end(
                code=code,
                error=progress.reason,
                body_read=progress.body_read,
                exchange=exchange,
                tenant=None if ticket is None else ticket.tenant,
            )
        if self._request_log is not None:
            self._request_log.ended(
                identity=progress.id,
                path=path,
                session=progress.session,
                code=code,
                error=progress.reason,
                started=progress.started,
                body_read=progress.body_read,
                exchange=exchange,
                caller=None if ticket is None else ticket.caller,
                trace=None if progress.trace is None else progress.trace.id,
            )
