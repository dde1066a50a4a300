"""Connects the parts that decide where requests go."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from matrixinfer.app.engines import Engines
from matrixinfer.app.traffic_state import TrafficState
from matrixinfer.config import Config, SchedulerConfig
from matrixinfer.pods.engine_api import EngineApi
from matrixinfer.pods.response_search import WAIT_SECONDS, ResponseSearch
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.routing.audit import Auditor
from matrixinfer.routing.candidates import Candidates
from matrixinfer.routing.destinations import Destinations
from matrixinfer.routing.ladder import LadderRecorder
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.prepare import Preparer
from matrixinfer.routing.router import Router
from matrixinfer.routing.routes import Routes
from matrixinfer.routing.sizing import Sizer
from matrixinfer.routing.stored_responses import FindResponse, StoredResponses
from matrixinfer.scheduler.framework import PluginWatch, Services
from matrixinfer.scheduler.plugin_loader import Installed, discover
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.media import MediaNames


def build_scheduler(
    config: SchedulerConfig, plugins: Installed | None = None, watch: PluginWatch | None = None
) -> Scheduler:
    """The scheduler with built-in and installed plugins. Raises `ConfigError`."""
    plugins = discover() if plugins is None else plugins
    generator = random.Random(config.seed)  # noqa: S311 - breaks ties, protects nothing
    services = Services(clock=time.perf_counter, rng=generator)
    return Scheduler(config, services, plugins, broken=plugins.broken, watch=watch)


def build_router(
    config: Config,
    engines: Engines,
    tokenizers: TokenizerManager,
    state: TrafficState,
    scheduler: Scheduler,
    sizer: Sizer,
    metrics: Metrics,
    clock: Callable[[], float],
    routes: Routes,
) -> Router:
    """The router in front of `engines`, which writes to `state`."""
    registry, caches = engines.registry, engines.setup.caches
    lookup, media = Lookup(registry, engines.setup.index, caches), MediaNames(clock)
    return Router(
        registry=registry,
        preparer=Preparer(
            registry,
            tokenizers,
            engines.blocks,
            lookup,
            state.parity,
            sizer,
            media=media,
            max_prefix_tokens=config.scheduler.max_prefix_tokens,
            destinations=Destinations(
                registry, engines.find_model, _find_response(engines, state.stored), routes=routes
            ),
            clock=clock,
        ),
        candidates=Candidates(
            registry,
            lookup,
            state.load,
            state.history,
            config.scheduler.weights,
            state.outliers,
            state.peer_loads,
            reuse=engines.drift.reuse,
            slow_start_seconds=config.discovery.slow_start_seconds,
        ),
        scheduler=scheduler,
        load=state.load,
        history=state.history,
        outliers=state.outliers,
        auditor=Auditor(engines.feeds, state.parity, engines.drift, lookup, engines.blocks, sizer, media),
        decisions=state.decisions,
        metrics=metrics,
        # An engine with a rule does not reuse every prefix that it holds.
        ladder=LadderRecorder(state.ladder, clock, has_rule=lambda endpoint: caches.rule_of(endpoint) is not None),
        clock=clock,
        watch=None if config.admin is None else state.dashboard,
    )


def _find_response(engines: Engines, stored: StoredResponses) -> FindResponse:
    """Finds the engine that stores a response."""
    api = EngineApi(engines.session, WAIT_SECONDS)
    return FindResponse(stored, ResponseSearch(api, lambda: engines.registry.pods))
