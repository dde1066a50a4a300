"""The trace of a request: a span for the gateway, one for each stage, and one for each time it is sent to a pod.

The attributes of what engines are asked follow OpenTelemetry's conventions for generative AI; those of the gateway's own
begin with `matrixinfer.`. No span has a prompt, an answer, a session or a key.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web
from multidict import CIMultiDict, MultiMapping
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from matrixinfer.access.gate import CLIENT_GONE
from matrixinfer.config import ENGINE_PATHS
from matrixinfer.gateway.access_log import outcome_of, predicted_hit
from matrixinfer.gateway.answer import Exchange
from matrixinfer.prompt.requests import READERS
from matrixinfer.routing.in_flight import InFlight

_W3C: Final = TraceContextTextMapPropagator()
_PARENT, _STATE = "traceparent", "tracestate"
_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""What the conventions call these. Others are named by the last part of their route."""
_STORED = "/v1/responses/"


class _Headers(Getter[MultiMapping[str]]):
    """Reads a client's headers. A `traceparent` that came twice counts as none, as nobody knows which is true."""

    def get(self, carrier: MultiMapping[str], key: str) -> list[str] | None:
        found = carrier.getall(key, [])
        return None if not found or (key == _PARENT and len(found) > 1) else found

    def keys(self, carrier: MultiMapping[str]) -> list[str]:
        return list(carrier.keys())


_HEADERS: Final = _Headers()


class RequestTraces:
    """Begins the trace of each request, or goes on with that of its client."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, request: web.BaseRequest, identity: str, started: float) -> RequestTrace:
        """A request has come, at `started` on the monotonic clock."""
        path, method = request.rel_url.raw_path, request.method
        attributes: dict[str, AttributeValue] = {
            "http.request.method": method,
            "url.path": path,
            "url.scheme": request.scheme,
            "matrixinfer.request_id": identity,
        }
        route = _route(path)
        if route is not None:
            attributes["http.route"] = route
        offset = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            method if route is None else f"{method} {route}",
            _W3C.extract(request.headers, getter=_HEADERS),
            SpanKind.SERVER,
            attributes,
            start_time=int(started * 1e9) + offset,
        )
        return RequestTrace(self._tracer, span, route=route, started=started, offset=offset)


class RequestTrace:
    """One request's spans. Times are seconds on the monotonic clock; `offset` added to them in ns gives Unix time."""

    __slots__ = (
        "_attempt",
        "_attempts",
        "_context",
        "_first_byte",
        "_offset",
        "_route",
        "_sent",
        "_span",
        "_started",
        "_tracer",
    )

    def __init__(self, tracer: Tracer, span: Span, *, route: str | None, started: float, offset: int) -> None:
        self._tracer = tracer
        self._span = span
        self._route = route
        self._started = started
        self._offset = offset
        self._context = set_span_in_context(span, Context())
        self._attempt: Span | None = None
        self._attempts = 0
        self._sent = started
        self._first_byte: float | None = None

    @property
    def id(self) -> str | None:
        """The trace's id in hexadecimal digits; None if nobody records it."""
        context = self._span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def add(self, name: str, began: float, ended: float) -> None:
        """A stage is over."""
        if self._span.is_recording():
            self._within(name, self._context, began, ended)

    def sent(self, in_flight: InFlight, headers: CIMultiDict[str]) -> None:
        """The request goes to a pod with these headers, which from now on name its span as their parent."""
        if not self._span.is_recording():
            _inject(headers, self._context, self._span.get_span_context())
            return
        self._attempts += 1
        self._sent, self._first_byte = time.monotonic(), None
        operation, model = self._operation, in_flight.decision.request.model
        self._attempt = self._tracer.start_span(
            f"{operation} {model}",
            self._context,
            SpanKind.CLIENT,
            {**_of_attempt(in_flight), "gen_ai.operation.name": operation, "matrixinfer.attempt": self._attempts},
            start_time=self._at(self._sent),
        )
        _inject(headers, set_span_in_context(self._attempt, Context()), self._attempt.get_span_context())

    def first_byte(self, at: float) -> None:
        """The answer's first byte has come."""
        self._first_byte = at

    def refused(self, status: int) -> None:
        """The pod's answer is not passed on."""
        if self._attempt is not None:
            self._attempt.set_attribute("http.response.status_code", status)
        self.failed(str(status))

    def failed(self, kind: str) -> None:
        """The pod sent no answer that could be passed on."""
        if self._attempt is not None:
            _fail(self._attempt, kind)
            self._end_attempt(time.monotonic())

    def end(
        self, *, code: int, error: str | None, body_read: float | None, exchange: Exchange | None, tenant: str | None
    ) -> None:
        """The request is over. `error` is why the gateway refused it, or cut its answer."""
        if not self._span.is_recording():
            return
        now = time.monotonic()
        if body_read is not None:
            self._within("body", self._context, self._started, body_read)
        span, outcome = self._span, outcome_of(code, error, exchange)
        span.set_attribute("http.response.status_code", code)
        span.set_attribute("matrixinfer.outcome", outcome)
        if tenant is not None:
            span.set_attribute("matrixinfer.tenant", tenant)
        if exchange is not None:
            span.set_attributes(_of_request(exchange))
            self._answered(exchange, now, error if error is not None else str(code) if code >= 400 else None)
        if code >= 500 or outcome == "broken_off":
            _fail(span, str(code) if error is None else error)
        elif error is not None:
            span.set_attribute("error.type", error)  # the client's mistake, not ours
        span.end(self._at(now))

    @property
    def _operation(self) -> str:
        if self._route is None:
            return "other"
        return _OPERATIONS.get(self._route) or self._route.rstrip("/").rpartition("/")[2]

    def _answered(self, exchange: Exchange, now: float, error: str | None) -> None:
        """The last attempt is over; the client has got its answer, or a part of it."""
        attempt, record = self._attempt, exchange.in_flight.record
        if attempt is None:
            return
        if record.status is not None:
            attempt.set_attribute("http.response.status_code", record.status)
        attempt.set_attributes(
            _known(
                {
                    "gen_ai.usage.input_tokens": record.counted,
                    "gen_ai.usage.cache_read.input_tokens": record.cached,
                    "gen_ai.usage.output_tokens": exchange.output_tokens,
                }
            )
        )
        if self._first_byte is not None and exchange.in_flight.prepared.request.streams:
            attempt.set_attribute("gen_ai.response.time_to_first_chunk", self._first_byte - self._sent)
        if error is not None and error != str(CLIENT_GONE):
            _fail(attempt, error)
        self._end_attempt(now)

    def _end_attempt(self, now: float) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        if self._first_byte is not None:
            context = set_span_in_context(attempt, Context())
            self._within("first byte", context, self._sent, self._first_byte)
            self._within("answer", context, self._first_byte, now)
        attempt.end(self._at(now))

    def _within(self, name: str, context: Context, began: float, ended: float) -> None:
        self._tracer.start_span(name, context, start_time=self._at(began)).end(self._at(ended))

    def _at(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset


def _inject(headers: CIMultiDict[str], context: Context, span: SpanContext) -> None:
    if not span.is_valid:
        return  # nothing is traced here: what the client sent passes
    headers.popall(_PARENT, None)
    headers.popall(_STATE, None)
    _W3C.inject(headers, context)


def _fail(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _route(path: str) -> str | None:
    """The path if it is one of a known few."""
    if path.startswith(_STORED):
        return _STORED
    return path if path in READERS or path in ENGINE_PATHS else None


def _of_attempt(in_flight: InFlight) -> dict[str, AttributeValue]:
    """What is known when a request is sent to a pod."""
    pod, request = in_flight.pod, in_flight.decision.request
    target = urlsplit(pod.url)
    engine = next((each.engine for each in in_flight.prepared.pods if each.name == pod.pod), None)
    attributes: dict[str, AttributeValue] = {
        "gen_ai.provider.name": engine or "unknown",
        "gen_ai.request.model": request.model,
        "server.address": target.hostname or "",
        "server.port": target.port or (443 if target.scheme == "https" else 80),
        "matrixinfer.pod": pod.name,
    }
    if request.streams:
        attributes["gen_ai.request.stream"] = True
    return attributes


def _of_request(exchange: Exchange) -> dict[str, AttributeValue]:
    """What is known of a request that was sent to a pod, under the names of the access log."""
    in_flight = exchange.in_flight
    record, request = in_flight.record, in_flight.request
    degraded = [reason.value for reason in in_flight.prepared.degraded]
    return {
        **_known(
            {
                "matrixinfer.prompt_tokens": request.prompt_tokens if record.counted is None else record.counted,
                "matrixinfer.output_tokens": exchange.output_tokens,
                "matrixinfer.predicted_hit_tokens": predicted_hit(in_flight),
                "matrixinfer.cached_tokens": record.cached,
            }
        ),
        **({"matrixinfer.degraded": degraded} if degraded else {}),
        "matrixinfer.model": request.model,
        "matrixinfer.pod": in_flight.pod.name,
        "matrixinfer.attempts": len(record.attempts),
    }


def _known(attributes: Mapping[str, int | None]) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}
