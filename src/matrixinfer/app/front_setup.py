"""Connects the parts that clients and operators talk to."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from matrixinfer.access.gate import Gate
from matrixinfer.app.dashboard_setup import dashboard
from matrixinfer.app.engines import Engines
from matrixinfer.app.traffic_state import TrafficState
from matrixinfer.app.workers.worker import MergedMetrics, Sockets, Worker
from matrixinfer.config import Config
from matrixinfer.dashboard.pages import Dashboard
from matrixinfer.gateway import descriptors
from matrixinfer.gateway.access_log import RequestLog
from matrixinfer.gateway.api import Api
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.credentials import Credentials
from matrixinfer.gateway.fan_out import FanOut
from matrixinfer.gateway.handlers import Admin, Status
from matrixinfer.gateway.ladder_page import LadderPage
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.models import Models
from matrixinfer.gateway.openapi import OpenApi
from matrixinfer.gateway.passing import Passing
from matrixinfer.gateway.pods_admin import PodsAdmin
from matrixinfer.gateway.protected import protected
from matrixinfer.gateway.proxy import Proxy
from matrixinfer.gateway.reload_admin import Reload, ReloadAdmin
from matrixinfer.gateway.retries import Retries
from matrixinfer.gateway.rewrite import BodyRewriter
from matrixinfer.gateway.server import Gateway
from matrixinfer.gateway.token_ids import TokenIdSender
from matrixinfer.gateway.upstream import Upstream
from matrixinfer.pods.discovery.fleet import Fleet
from matrixinfer.prompt.memory import Memory
from matrixinfer.routing.router import Router
from matrixinfer.routing.routes import Routes as ModelRoutes
from matrixinfer.telemetry.intervals import Intervals
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.retry_budget import RetryBudget
from matrixinfer.trust.cache_views import FeedReports

if TYPE_CHECKING:
    from matrixinfer.gateway.request_trace import RequestTraces  # needs an extra

_NOTED_SECONDS = 10.0
"""How often it is logged that requests are refused."""


@dataclass(frozen=True, kw_only=True)
class Behind:
    """What stands behind the front."""

    config: Config
    engines: Engines
    state: TrafficState
    router: Router
    routes: ModelRoutes
    upstream: Upstream
    memory: Memory
    metrics: Metrics
    fleet: Fleet
    gate: Gate | None
    request_log: RequestLog | None
    traces: RequestTraces | None
    tokenizer_views: Callable[[], Mapping[str, Mapping[str, object]]]
    ask_again: Callable[[str], None]
    """Called with a pod that may serve other adapters now."""
    reload: Reload | None
    """None where the configuration cannot be read again."""
    worker: Worker | None
    token_ids: TokenIdSender | None
    """None where engines make all token ids themselves."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """The listeners, and the parts of what they serve that a new configuration reaches."""

    gateway: Gateway
    bodies: Bodies
    retries: Retries
    proxy: Proxy
    credentials: Credentials
    fan_out: FanOut
    pods_admin: PodsAdmin


def build_front(behind: Behind) -> Front:
    """The front of a gateway. It does not listen yet."""
    config, worker = behind.config, behind.worker
    draining = asyncio.Event()
    status = Status(behind.engines.registry, behind.metrics, draining).routes()
    bodies = Bodies(config.limits, behind.memory, Intervals(_NOTED_SECONDS, time.monotonic))
    retries = _retries(config)
    credentials = _credentials(behind)
    proxy = _proxy(behind, retries, credentials, draining)
    pods_admin = PodsAdmin(behind.fleet, bodies, drain_seconds=config.discovery.drain_seconds)
    fan_out = FanOut(behind.engines.registry, behind.upstream, config.limits, credentials, changed=behind.ask_again)
    served = _api_routes(behind, proxy, bodies, fan_out, status)
    gateway = Gateway(
        config,
        api={**served, **OpenApi(served).routes()},
        admin={
            **({} if worker is None else Sockets(worker, lambda: gateway).routes()),
            **_admin(behind, bodies).routes(),
            **LadderPage(behind.state.ladder.since).routes(),
            **pods_admin.routes(),
            **ReloadAdmin(behind.reload).routes(),
            **_dashboard(behind, draining, lambda: gateway.url).routes(),
            **status,
        },
        draining=draining,
        max_connections=config.connections.max or descriptors.for_clients(),
        sockets=None if worker is None else worker.sockets(),
    )
    return Front(
        gateway=gateway,
        bodies=bodies,
        retries=retries,
        proxy=proxy,
        credentials=credentials,
        fan_out=fan_out,
        pods_admin=pods_admin,
    )


def stripped(config: Config) -> Sequence[str]:
    """Further headers of clients that engines do not get."""
    return () if config.access is None else config.access.strip_headers


def _retries(config: Config) -> Retries:
    budget = RetryBudget(config.retries.budget_share, config.retries.budget_per_second, time.monotonic)
    return Retries(config.retries, budget, random.Random())  # noqa: S311 - spreads retries, protects nothing


def _credentials(behind: Behind) -> Credentials:
    config = behind.config
    return Credentials(behind.engines.keys.at, always=config.engine_keys.send == "always", strips=stripped(config))


def _proxy(behind: Behind, retries: Retries, credentials: Credentials, draining: asyncio.Event) -> Proxy:
    config = behind.config
    rewriter = BodyRewriter(behind.engines.registry, adds_usage=config.drift.inject_usage)
    return Proxy(
        behind.upstream,
        retries,
        rewriter,
        behind.metrics,
        config.limits,
        draining,
        credentials,
        config.api.sse_keep_alive_seconds,
        behind.token_ids,
    )


def _api_routes(behind: Behind, proxy: Proxy, bodies: Bodies, fan_out: FanOut, status: Routes) -> Routes:
    config, registry, gate = behind.config, behind.engines.registry, behind.gate
    log, stored = behind.request_log, behind.state.stored
    api = Api(behind.router, proxy, behind.metrics, bodies, log, gate, stored, behind.traces)
    passing = Passing(config.api.paths, api.dispatch, partial(api.apart, answer=fan_out))
    models = Models(registry, behind.engines.find_model, behind.routes.names)
    public = dict(status)
    if not config.public_metrics:
        del public["/metrics"]
    elif behind.worker is not None:
        public["/metrics"] = {"GET": MergedMetrics(behind.worker).expose}
    return {**api.routes(), **protected(models.routes(), gate), **public, **passing.routes()}


def _admin(behind: Behind, bodies: Bodies) -> Admin:
    engines, state = behind.engines, behind.state
    return Admin(
        behind.router,
        engines.registry,
        state.decisions,
        FeedReports(engines.feeds, engines.setup.caches, engines.drift.reuse),
        state.outliers,
        state.parity,
        bodies,
        behind.tokenizer_views,
        unmatched=engines.setup.unmatched,
    )


def _dashboard(behind: Behind, draining: asyncio.Event, api: Callable[[], str]) -> Dashboard:
    state = behind.state
    return dashboard(
        behind.config,
        behind.engines,
        history=state.dashboard,
        outliers=state.outliers,
        load=state.load,
        decisions=state.decisions,
        slow_start_seconds=lambda: behind.router.slow_start_seconds,
        draining=draining,
        api=api,
    )
