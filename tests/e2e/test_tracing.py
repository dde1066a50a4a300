"""Spans of requests through a gateway, as a collector gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDictProxy
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from structlog.testing import capture_logs

from matrixinfer.app.service import Service
from matrixinfer.config import ApiConfig, BlocksConfig, Config, PodConfig, TracingConfig, checked
from matrixinfer.config.admission import AdmissionConfig
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine
from tests.collector import Collector, attributes, collector
from tests.integration.gateway_support import pod
from tests.ports import free_port
from tests.waiting import eventually

from .fleet import gateway

PATH = "/v1/completions"
STORED = "/v1/responses/resp_1"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1,other=2"}
ANSWER = {
    "object": "text_completion",
    "choices": [{"text": "an answer that nobody else reads"}],
    "usage": {"prompt_tokens": 40, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 32}},
}


def tracing(url: str, **settings: float) -> TracingConfig:
    return TracingConfig(enabled=True, endpoint=url, interval_seconds=0.05, **settings)  # type: ignore[arg-type]


@dataclass
class Engine:
    """Answers prompts with `status`, and keeps the headers that they came with. `breaks` its connection before or in it."""

    status: int = 200
    breaks: Literal["before", "in"] | None = None
    hold: asyncio.Event | None = None
    """What answers wait for."""
    seen: list[CIMultiDictProxy[str]] = field(default_factory=list)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/models":
            card = {"id": "m", "object": "model", "owned_by": "vllm", "parent": None}
            return web.json_response({"object": "list", "data": [card]})
        if request.path == PATH:
            self.seen.append(request.headers)
            await request.read()
            return await self.answer(request)
        return web.Response(status=200 if request.path in ("/health", STORED, "/own/path") else 404)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.hold is not None:
            await self.hold.wait()
        if self.breaks is None:
            return web.json_response(ANSWER, status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if self.breaks == "in":
            await response.prepare(request)
            await response.write(b"data: {}\n\n")
        assert request.transport is not None
        request.transport.close()
        return response


@dataclass
class Sender:
    """Sends requests to a gateway."""

    service: Service
    session: aiohttp.ClientSession

    async def send(self, headers: dict[str, str] | None = None, **fields: object) -> int:
        body = {"model": "m", "prompt": "a prompt that nobody else reads", **fields}
        async with self.session.post(self.service.gateway.url + PATH, json=body, headers=headers) as response:
            await response.read()
            return response.status

    def waiting(self) -> float | None:
        name = "matrixinfer_admission_requests"
        return self.service.metrics.registry.get_sample_value(name, {"state": "waiting"})

    def spans(self, outcome: str) -> float:
        found = self.service.metrics.registry.get_sample_value("matrixinfer_trace_spans_total", {"outcome": outcome})
        return 0.0 if found is None else found


@asynccontextmanager
async def before(
    *engines: Engine, config: TracingConfig, admission: AdmissionConfig | None = None, front: ApiConfig | None = None
) -> AsyncIterator[Sender]:
    """A gateway before engines."""
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(pod(each.handle)) for each in engines]
        pods = tuple(PodConfig(name=f"p{i}", url=url, kv_events="none") for i, url in enumerate(urls))
        settings = Config(
            listen="127.0.0.1:0",
            admin="127.0.0.1:0",
            pods=pods,
            tracing=config,
            admission=admission,
            api=front or ApiConfig(),
        )
        service = await stack.enter_async_context(Service(checked(settings)))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        registry = service.engines.registry
        await eventually(lambda: all(each.healthy and each.served is not None for each in registry.pods))
        yield Sender(service, session)


def has(kept: Collector, name: str, count: int = 1) -> Callable[[], bool]:
    return lambda: len(kept.named(name)) >= count


def is_within(inner: Span, outer: Span) -> bool:
    return (
        outer.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano <= outer.end_time_unix_nano
    )


async def test_a_trace_goes_from_the_client_through_the_gateway_to_the_engine() -> None:
    engine = Engine()
    async with collector() as kept, before(engine, config=tracing(kept.url)) as sender:
        headers = {**CLIENT, "authorization": "Bearer sk-key", "x-session-id": "a-session", "x-request-id": "r-1"}
        assert await sender.send(headers) == 200
        await eventually(has(kept, f"POST {PATH}"))
    server, client = kept.one(f"POST {PATH}"), kept.one("text_completion m")
    assert {each.trace_id.hex() for each in kept.spans} == {TRACE}
    assert (server.parent_span_id.hex(), server.kind) == (PARENT, Span.SPAN_KIND_SERVER)
    assert (client.parent_span_id, client.kind) == (server.span_id, Span.SPAN_KIND_CLIENT)
    assert all(is_within(each, server) for each in kept.spans)
    assert kept.below(server) == ["body", "parse", "tokenize", "bytes", "schedule", "text_completion m"]
    assert kept.below(client) == ["first byte", "answer"]
    assert engine.seen[0]["traceparent"] == f"00-{TRACE}-{client.span_id.hex()}-01"
    assert engine.seen[0]["tracestate"] == CLIENT["tracestate"]
    said = attributes(server)
    assert said["matrixinfer.request_id"] == "r-1"
    assert (said["matrixinfer.model"], said["matrixinfer.pod"], said["matrixinfer.outcome"]) == ("m", "p0", "answered")
    assert (said["matrixinfer.prompt_tokens"], said["matrixinfer.output_tokens"]) == (40, 7)
    assert said["matrixinfer.cached_tokens"] == 32
    assert said["matrixinfer.degraded"] == ["tokenize"]
    assert (said["http.route"], said["http.response.status_code"]) == (PATH, 200)
    assert "error.type" not in said
    said = attributes(client)
    assert (said["gen_ai.operation.name"], said["gen_ai.request.model"]) == ("text_completion", "m")
    assert (said["gen_ai.provider.name"], said["server.address"]) == ("vllm", "127.0.0.1")
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (40, 7)
    assert said["gen_ai.usage.cache_read.input_tokens"] == 32
    assert kept.resource["service.name"] == "matrixinfer-gateway"
    for secret in (b"nobody else", b"sk-key", b"a-session"):
        assert secret not in kept.received


async def test_predicted_and_reported_hits_and_the_first_chunk_are_in_the_spans(tokenizer: LocalTokenizer) -> None:
    engine = SimEngineConfig(model="m", block_size=16, num_blocks=1_000)
    body = {
        "model": "m",
        "prompt": "one two three four five " * 20,
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with (
        collector() as kept,
        SimEngine(engine, tokenizer) as one,
        gateway([one], blocks=BlocksConfig(size=16), tracing=tracing(kept.url)) as fleet,
    ):
        await fleet.settled()
        for number in (1, 2):
            async with fleet.session.post(fleet.url + PATH, json=body) as response:
                await response.read()
            await fleet.settled()
            await eventually(has(kept, f"POST {PATH}", number))
    first, second = kept.named(f"POST {PATH}")
    assert first.trace_id != second.trace_id
    assert {"tokenize", "match"} <= set(kept.below(second))
    said = attributes(second)
    assert said["matrixinfer.predicted_hit_tokens"] == said["matrixinfer.cached_tokens"] != 0
    assert "matrixinfer.degraded" not in said
    said = attributes(kept.named("text_completion m")[1])
    assert said["gen_ai.request.stream"] is True
    assert isinstance(said["gen_ai.response.time_to_first_chunk"], float)


async def test_each_pod_that_is_tried_has_a_span() -> None:
    engines = [Engine(status=503), Engine(status=503)]
    async with collector() as kept, before(*engines, config=tracing(kept.url)) as sender:
        assert await sender.send(CLIENT) == 503
        await eventually(has(kept, f"POST {PATH}"))
    server, (first, second) = kept.one(f"POST {PATH}"), kept.named("text_completion m")
    assert first.parent_span_id == second.parent_span_id == server.span_id
    assert attributes(first)["matrixinfer.pod"] != attributes(second)["matrixinfer.pod"]
    assert [attributes(each)["matrixinfer.attempt"] for each in (first, second)] == [1, 2]
    for each in (first, second, server):
        assert each.status.code == Status.STATUS_CODE_ERROR
        assert (attributes(each)["error.type"], attributes(each)["http.response.status_code"]) == ("503", 503)
    parents = [each["traceparent"].split("-")[2] for engine in engines for each in engine.seen]
    assert sorted(parents) == sorted([first.span_id.hex(), second.span_id.hex()])


@pytest.mark.parametrize(
    ("path", "server", "client"),
    [(STORED, "GET /v1/responses/", "responses m"), ("/own/path", "GET", "other m")],
)
async def test_names_of_spans_have_nothing_that_clients_make_up(path: str, server: str, client: str) -> None:
    front = ApiConfig(paths=("/v1/responses/", "/own/"))
    async with collector() as kept, before(Engine(), config=tracing(kept.url), front=front) as sender:
        async with sender.session.get(f"{sender.service.gateway.url}{path}?key=sk-1") as response:
            assert response.status == 200
        await eventually(has(kept, server))
    assert kept.below(kept.one(server))[-1] == client
    assert attributes(kept.one(server))["url.path"] == path
    assert b"sk-1" not in kept.received


async def test_an_attempt_that_breaks_is_followed_by_another_one() -> None:
    engines = [Engine(breaks="before"), Engine()]
    async with collector() as kept, before(*engines, config=tracing(kept.url)) as sender:
        while not engines[0].seen:
            assert await sender.send() == 200
        await eventually(lambda: len(kept.named("text_completion m")) > len(kept.named(f"POST {PATH}")))
    failed = next(each for each in kept.spans if each.status.code == Status.STATUS_CODE_ERROR)
    server = next(each for each in kept.spans if each.span_id == failed.parent_span_id)
    assert attributes(failed)["error.type"] == "disconnect"
    assert "http.response.status_code" not in attributes(failed)
    assert kept.below(failed) == []
    assert kept.below(server)[-2:] == ["text_completion m", "text_completion m"]
    assert (attributes(server)["matrixinfer.attempts"], attributes(server)["matrixinfer.outcome"]) == (2, "answered")
    assert server.status.code == Status.STATUS_CODE_UNSET


async def test_an_answer_that_is_broken_off_is_an_error_of_both() -> None:
    async with collector() as kept, before(Engine(breaks="in"), config=tracing(kept.url)) as sender:
        with pytest.raises(aiohttp.ClientError):
            await sender.send(stream=True)
        await eventually(has(kept, f"POST {PATH}"))
    for name in (f"POST {PATH}", "text_completion m"):
        assert kept.one(name).status.code == Status.STATUS_CODE_ERROR
        assert attributes(kept.one(name))["error.type"] == "pod_unreachable"
    assert attributes(kept.one(f"POST {PATH}"))["matrixinfer.outcome"] == "broken_off"
    assert kept.below(kept.one("text_completion m")) == ["first byte", "answer"]


async def test_a_client_that_leaves_is_no_error() -> None:
    engine = Engine(hold=asyncio.Event())
    async with collector() as kept, before(engine, config=tracing(kept.url)) as sender:
        leaving = asyncio.create_task(sender.send())
        await eventually(lambda: bool(engine.seen))
        leaving.cancel()
        await eventually(has(kept, f"POST {PATH}"))
    said = attributes(kept.one(f"POST {PATH}"))
    assert (said["matrixinfer.outcome"], said["http.response.status_code"]) == ("client_left", 499)
    assert {each.status.code for each in kept.spans} == {Status.STATUS_CODE_UNSET}


async def test_waiting_in_turn_is_a_span() -> None:
    engine = Engine(hold=asyncio.Event())
    assert engine.hold is not None
    admission = AdmissionConfig(max_concurrent_requests=1)
    async with collector() as kept, before(engine, config=tracing(kept.url), admission=admission) as sender:
        first = asyncio.create_task(sender.send())
        await eventually(lambda: bool(engine.seen))
        second = asyncio.create_task(sender.send())
        await eventually(lambda: sender.waiting() == 1)
        engine.hold.set()
        assert set(await asyncio.gather(first, second)) == {200}
        await eventually(has(kept, f"POST {PATH}", 2))
    one, other = kept.named("admission")
    answered = kept.named("text_completion m")[0].end_time_unix_nano
    assert one.end_time_unix_nano < answered
    assert other.start_time_unix_nano < answered < kept.named("text_completion m")[1].start_time_unix_nano


async def test_a_request_that_the_gateway_refuses_says_why() -> None:
    async with collector() as kept, before(Engine(), config=tracing(kept.url)) as sender:
        assert await sender.send(model="other") == 404
        await eventually(has(kept, f"POST {PATH}"))
    span = kept.one(f"POST {PATH}")
    assert attributes(span)["error.type"] == "model_not_found"
    assert attributes(span)["matrixinfer.outcome"] == "refused"
    assert span.status.code == Status.STATUS_CODE_UNSET  # the client's mistake
    assert kept.below(span) == ["body", "parse"]


@pytest.mark.parametrize("state", ["vendor=1,other=2", ""])
async def test_what_the_client_does_not_want_sampled_is_not_recorded_but_passes(state: str) -> None:
    engine = Engine()
    async with collector() as kept, before(engine, config=tracing(kept.url)) as sender:
        parent = {"traceparent": f"00-{TRACE}-{PARENT}-00", **({"tracestate": state} if state else {})}
        assert await sender.send(parent) == 200
        assert await sender.send(CLIENT) == 200
        await eventually(has(kept, f"POST {PATH}"))
    version, trace, span, flags = engine.seen[0]["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "00")
    assert span != "0" * 16
    assert engine.seen[0].get("tracestate", "") == state
    assert len(kept.named(f"POST {PATH}")) == 1


async def test_the_ratio_is_of_traces_that_begin_here() -> None:
    async with collector() as kept, before(Engine(), config=tracing(kept.url, sample_ratio=0.0)) as sender:
        await sender.send()
        await sender.send(CLIENT)
        await eventually(has(kept, f"POST {PATH}"))
        await sender.send({"traceparent": f"00-{TRACE}-{PARENT}-01-beyond"})  # malformed: as if there were none
    assert kept.one(f"POST {PATH}").trace_id.hex() == TRACE


async def test_two_parents_are_none() -> None:
    engine = Engine()
    async with collector() as kept, before(engine, config=tracing(kept.url)) as sender:
        headers = [("traceparent", CLIENT["traceparent"]), ("traceparent", f"00-{'1' * 32}-{PARENT}-01")]
        url = sender.service.gateway.url + PATH
        async with sender.session.post(url, json={"model": "m", "prompt": "x"}, headers=headers) as response:
            assert response.status == 200
        await eventually(has(kept, f"POST {PATH}"))
    assert kept.one(f"POST {PATH}").parent_span_id == b""
    assert len(engine.seen[0].getall("traceparent")) == 1
    assert kept.one("text_completion m").span_id.hex() in engine.seen[0]["traceparent"]


async def test_a_dead_collector_costs_spans_and_nothing_else() -> None:
    settings = {"queue_spans": 30, "batch_spans": 10, "timeout_seconds": 0.2}
    with capture_logs() as logs:
        url = f"http://127.0.0.1:{free_port()}"
        async with before(Engine(), config=tracing(url, **settings)) as sender:
            for _ in range(12):
                assert await sender.send() == 200
            await eventually(lambda: sender.spans("failed") + sender.spans("dropped") > 50)
            assert sender.spans("exported") == 0
    failures = [each for each in logs if each["event"] == "spans_export_failed"]
    assert len(failures) == 1
    assert failures[0]["reason"] == "connection refused"


async def test_spans_that_find_no_room_are_dropped_and_counted() -> None:
    settings = {"queue_spans": 10, "batch_spans": 10}
    async with collector() as kept, before(Engine(), config=tracing(kept.url, **settings)) as sender:
        kept.status = 503  # which is tried again
        await asyncio.gather(*(sender.send() for _ in range(10)))
        await eventually(lambda: kept.posts > 0)
        dropped = sender.spans("dropped")
        assert dropped >= 80
        kept.status = 200
        await eventually(lambda: sender.spans("exported") == 10)
        assert sender.spans("failed") == 0
        assert await sender.send() == 200
        await eventually(lambda: sender.spans("exported") > 10)


async def test_without_tracing_the_headers_pass_unchanged() -> None:
    engine = Engine()
    async with before(engine, config=TracingConfig()) as sender:
        assert await sender.send(CLIENT) == 200
    assert {name: engine.seen[0].getall(name) for name in CLIENT} == {name: [CLIENT[name]] for name in CLIENT}


def test_without_tracing_nothing_of_it_is_imported() -> None:
    program = """
import asyncio, sys
from matrixinfer.app.service import Service
from matrixinfer.config import Config, PodConfig, checked

async def run():
    pods = (PodConfig(name="p", url="http://127.0.0.1:9", kv_events="none"),)
    async with Service(checked(Config(listen="127.0.0.1:0", admin="127.0.0.1:0", pods=pods))):
        pass

asyncio.run(run())
ours = ("matrixinfer.gateway.request_trace", "matrixinfer.telemetry.tracing", "opentelemetry.exporter", "requests")
print([name for name in ours if name in sys.modules])  # the client of Redis imports the SDK, where it is installed
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
