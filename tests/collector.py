"""An OpenTelemetry collector: takes protobuf over HTTP, and keeps the spans."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Value = str | int | float | bool | list[str]


@dataclass
class Collector:
    """What has been sent to `url`. `status` is what it answers from now on."""

    url: str = ""
    status: int = 200
    posts: int = 0
    received: bytes = b""
    headers: CIMultiDictProxy[str] = field(default_factory=lambda: CIMultiDictProxy(CIMultiDict()))
    spans: list[Span] = field(default_factory=list)
    resource: dict[str, Value] = field(default_factory=dict)

    async def take(self, request: web.BaseRequest) -> web.StreamResponse:
        self.posts += 1
        if self.status != 200:
            return web.Response(status=self.status)
        assert request.path == "/v1/traces"
        assert request.headers["Content-Type"] == "application/x-protobuf"
        self.headers = request.headers
        body = await request.read()
        self.received += body
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = {pair.key: _value(pair.value) for pair in each.resource.attributes}
            for scope in each.scope_spans:
                self.spans += scope.spans
        return web.Response(body=b"", content_type="application/x-protobuf")

    def named(self, name: str) -> list[Span]:
        """The spans of this name, in the order of their beginning."""
        return sorted((each for each in self.spans if each.name == name), key=lambda each: each.start_time_unix_nano)

    def one(self, name: str) -> Span:
        """The only span of this name."""
        (span,) = self.named(name)
        return span

    def below(self, span: Span) -> list[str]:
        """The names of a span's children, in the order of their beginning."""
        children = [each for each in self.spans if each.parent_span_id == span.span_id]
        return [each.name for each in sorted(children, key=lambda each: each.start_time_unix_nano)]


def attributes(span: Span) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in span.attributes}


def _value(value: AnyValue) -> Value:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [each.string_value for each in value.array_value.values]
    assert kind is not None
    found: Value = getattr(value, kind)
    return found


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    kept = Collector()
    runner = web.ServerRunner(web.Server(kept.take, access_log=None))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        kept.url = f"http://{host}:{port}"
        yield kept
    finally:
        await runner.cleanup()
