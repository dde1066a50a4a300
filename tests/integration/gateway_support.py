"""A gateway in front of scripted pods, with a router that does no more than parse and take pods in order."""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import aiohttp
import msgspec
from aiohttp import web

from matrixinfer.config import (
    ApiConfig,
    Config,
    ConnectionsConfig,
    DrainConfig,
    LimitsConfig,
    ModelConfig,
    OutliersConfig,
    PodConfig,
    PodWatchConfig,
    RetriesConfig,
)
from matrixinfer.errors import InvalidRequest
from matrixinfer.gateway.api import Api
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.credentials import Credentials
from matrixinfer.gateway.fan_out import FanOut
from matrixinfer.gateway.handlers import Admin, Status
from matrixinfer.gateway.models import Models
from matrixinfer.gateway.passing import Passing
from matrixinfer.gateway.proxy import Proxy
from matrixinfer.gateway.retries import Retries
from matrixinfer.gateway.rewrite import BodyRewriter, PodBody
from matrixinfer.gateway.server import Gateway
from matrixinfer.gateway.upstream import upstream
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.pods.session import MAX_FIELD_BYTES
from matrixinfer.prompt.memory import Memory
from matrixinfer.prompt.requests import Reader
from matrixinfer.routing.decision_log import DecisionLog
from matrixinfer.routing.router import Router
from matrixinfer.routing.stored_responses import StoredResponses
from matrixinfer.scheduler.framework import Candidate, Decision, SchedulingRequest
from matrixinfer.telemetry.intervals import Intervals
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.retry_budget import RetryBudget
from matrixinfer.trust.cache_views import FeedCaches, FeedReports
from matrixinfer.trust.parity import Parity
from tests.ports import free_port
from tests.waiting import DEADLINE_SECONDS

CHAT = "/v1/chat/completions"
BODY = b'{"model": "tiny",  "messages": [{"role":"user","content":"h\\u00e9llo"}] , "unknown": 1.50}'
LOOPBACK = "127.0.0.1"
FOREVER = 3600.0
"""Seconds that nobody waits."""

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class FakePrepared:
    """What the proxy reads of a prepared request."""

    body: bytes
    prompt: None = None


@dataclass
class FakeInFlight:
    """Records what the proxy reports."""

    decision: Decision
    prepared: FakePrepared
    registry: PodRegistry
    reports: list[str] = field(default_factory=list)
    wants_usage: bool = True
    needs_witness: bool = False

    def __post_init__(self) -> None:
        self.pod = self.decision.chosen
        self.tried = [self.pod.name]

    def following(self) -> Candidate | None:
        return next((each for each in self.decision.attempts if each.name not in self.tried), None)

    def move(self, pod: Candidate) -> None:
        self.tried.append(pod.name)
        self.reports.append(f"move {pod.name}")
        self.pod = pod

    def watch_down(self, pod: str, act: Callable[[], None]) -> None:
        self.registry.watch_down(pod, act)

    def unwatch_down(self, pod: str, act: Callable[[], None]) -> None:
        self.registry.unwatch_down(pod, act)

    def failed(self, kind: str) -> None:
        self.reports.append(f"failed {self.pod.name}")
        if kind.startswith("connect"):
            self.registry.failed(self.pod.name)

    def timed_out(self) -> None:
        self.reports.append(f"timed_out {self.pod.name}")

    def broke(self, kind: str) -> None:
        self.reports.append(f"broke {self.pod.name}")

    def answered(self, status: int, retry_after: float | None = None) -> None:
        if status < 500:
            self.reports.append(f"answered {self.pod.name}")
            self.registry.answered(self.pod.name)

    def usage(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        self.reports.append(f"usage {self.pod.name} {prompt_tokens} {cached_tokens}")

    def first_byte(self, seconds: float) -> None:
        self.reports.append("first_byte")


@dataclass
class FakeRewriter:
    """Passes bodies on as they are."""

    adds_usage: bool = False

    def body_for(self, pod: str, prompt: None, body: bytes, rank: int | None, *, adds_usage: bool) -> PodBody:
        return PodBody(body, self.adds_usage, rank)


class FakeRouter:
    """Ranks the pods of the model in the order configured."""

    def __init__(self, registry: PodRegistry) -> None:
        self.registry = registry
        self.dispatched: list[FakeInFlight] = []
        self.sessions: list[str | None] = []
        self.sought: list[str] = []
        """Models for which engines would have been asked."""
        self.stored = StoredResponses()
        self.changed: list[str] = []
        """Pods whose adapters have changed."""
        self.removed: set[str] = set()
        """Pods that a filter removes."""

    @asynccontextmanager
    async def dispatch(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str,
        session: str | None = None,
        ticket: None = None,
        read: Reader | None = None,
        headers: object = None,
        stages: object = None,
    ) -> AsyncIterator[FakeInFlight]:
        try:
            requested = msgspec.json.decode(body)["model"] if read is None else read(path, body).model or "tiny"
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise InvalidRequest("The body is no JSON object with a model.", param="model") from error
        if requested == "fault":
            raise RuntimeError("secret detail")
        model, pods = self.registry.resolve(requested)
        candidates = [Candidate(name=pod.name, url=pod.url) for pod in pods]
        self.sessions.append(session)
        chosen = decision(request_id, model, candidates, self.removed)
        request = FakeInFlight(chosen, FakePrepared(body), self.registry)
        self.dispatched.append(request)
        try:
            yield request
        finally:
            request.reports.append("closed")

    async def find_model(self, name: str) -> bool:
        self.sought.append(name)
        return self.registry.is_served(name)

    async def explain(self, path: str, body: bytes, **_: object) -> dict[str, object]:
        return {"path": path, "length": len(body)}

    @property
    def reports(self) -> list[str]:
        """What was reported of the last request."""
        return self.dispatched[-1].reports


def decision(request_id: str, model: str, candidates: list[Candidate], removed: set[str]) -> Decision:
    request = SchedulingRequest(id=request_id, model=model, prompt_tokens=None, block_size=16, chain=(), prefix=b"")
    return Decision(
        request=request,
        candidates=candidates,
        ranked=[pod for pod in candidates if pod.name not in removed],
        filtered=dict.fromkeys(removed, "too much to do"),
        scores={},
        totals={},
        timings_ms={},
    )


@dataclass
class Rig:
    """A gateway, its router, and a client."""

    gateway: Gateway
    router: FakeRouter
    rewriter: FakeRewriter
    metrics: Metrics
    client: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return self.gateway.url

    @property
    def admin_url(self) -> str:
        assert self.gateway.admin_url is not None
        return self.gateway.admin_url

    def post(self, body: bytes | io.BytesIO | AsyncIterator[bytes] = BODY, path: str = CHAT, **more: Any) -> Any:
        headers = {"Content-Type": "application/json"} | more.pop("headers", {})
        return self.client.post(self.url + path, data=body, headers=headers, **more)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"matrixinfer_{name}", labels)


@asynccontextmanager
async def rig(
    *urls: str,
    limits: LimitsConfig | None = None,
    watch: PodWatchConfig | None = None,
    retries: RetriesConfig | None = None,
    drain: DrainConfig | None = None,
    connections: ConnectionsConfig | None = None,
    max_connections: int | None = None,
    admin_names: tuple[str, ...] = (),
    front: ApiConfig | None = None,
) -> AsyncIterator[Rig]:
    """A running gateway before pods named a, b, c … at these URLs, all said to serve the model `tiny`."""
    pods = tuple(PodConfig(name=name, url=url, kv_events="none") for name, url in zip("abcdefgh", urls, strict=False))
    limits = limits or LimitsConfig(first_byte_timeout_seconds=DEADLINE_SECONDS)
    config = Config(
        listen=f"{LOOPBACK}:0",
        admin=f"{LOOPBACK}:0",
        models=(ModelConfig(name="tiny"),),
        pods=pods,
        limits=limits,
        drain=drain or DrainConfig(timeout_seconds=DEADLINE_SECONDS),
        connections=connections or ConnectionsConfig(),
        admin_names=admin_names,
        api=front or ApiConfig(),
    )
    registry = PodRegistry(pods, config.models, watch or PodWatchConfig(), clock=time.monotonic)
    for pod in registry.pods:
        registry.answered(pod.name)
    router, rewriter, metrics = FakeRouter(registry), FakeRewriter(), Metrics()
    draining = asyncio.Event()
    async with AsyncExitStack() as stack:
        pool = stack.enter_context(upstream(limits, metrics))
        retries = retries or RetriesConfig(jitter_seconds=0.0)
        budget = RetryBudget(retries.budget_share, retries.budget_per_second, time.monotonic)
        credentials = Credentials(lambda _: None, always=False)
        proxy = Proxy(
            pool,
            Retries(retries, budget, random.Random(1)),
            cast("BodyRewriter", rewriter),
            metrics,
            limits,
            draining,
            credentials,
            config.api.sse_keep_alive_seconds,
        )
        status = Status(registry, metrics, draining).routes()
        bodies = Bodies(limits, Memory(limits.memory_bytes), Intervals(10.0, time.monotonic))
        handlers = Api(cast("Router", router), proxy, metrics, bodies, stored=router.stored)
        fan_out = FanOut(registry, pool, limits, credentials, changed=router.changed.append)
        api = {
            **handlers.routes(),
            **Passing(config.api.paths, handlers.dispatch, partial(handlers.apart, answer=fan_out)).routes(),
        }
        models = Models(registry, router.find_model).routes()
        parity, feeds = Parity(metrics, time.monotonic), FeedReports({}, FeedCaches({}))
        outliers = Outliers(OutliersConfig(), time.monotonic)
        admin = Admin(cast("Router", router), registry, DecisionLog(10), feeds, outliers, parity, bodies).routes()
        gateway = await stack.enter_async_context(
            Gateway(
                config,
                api={**api, **models, **status},
                admin={**admin, **status},
                draining=draining,
                max_connections=max_connections,
            )
        )
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=DEADLINE_SECONDS)
        client = aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, max_field_size=MAX_FIELD_BYTES
        )
        await stack.enter_async_context(client)
        yield Rig(gateway, router, rewriter, metrics, client)


@asynccontextmanager
async def pod(handler: Handler, port: int = 0) -> AsyncIterator[str]:
    """An aiohttp upstream; its base URL."""
    server = web.Server(handler, handler_cancellation=True, access_log=None, auto_decompress=False)
    listening = await asyncio.get_running_loop().create_server(server, LOOPBACK, port)
    try:
        yield f"http://{LOOPBACK}:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        server.pre_shutdown()
        await server.shutdown(0.1)


@asynccontextmanager
async def raw_pod(talk: Talk, host: str = LOOPBACK) -> AsyncIterator[str]:
    """An upstream that speaks bytes; its base URL. The connection ends when `talk` returns."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def nowhere() -> str:
    """A base URL at which nobody listens."""
    return f"http://{LOOPBACK}:{free_port()}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """A request with a Content-Length, head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
    )
    return head + await reader.readexactly(length)


async def ok(request: web.BaseRequest) -> web.StreamResponse:
    """A pod that answers at once."""
    await request.read()
    return web.Response(body=b'{"ok":true}', headers={"Content-Type": "application/json"})
