"""The gateway's composition root: it creates every part, connects them, and knows nothing else."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from matrixinfer.access.gate import Gate
from matrixinfer.app.access_log import open_access_log
from matrixinfer.app.access_setup import gate as access_gate
from matrixinfer.app.collectors import (
    IndexCollector,
    KeptCollector,
    LogCollector,
    MemoryCollector,
    PluginCollector,
    TokenCacheCollector,
    TokenSourceCollector,
)
from matrixinfer.app.dashboard_setup import dashboard
from matrixinfer.app.engines import Engines
from matrixinfer.app.fleet_setup import PodSources, pod_sources
from matrixinfer.app.ladder_collector import LadderCollector
from matrixinfer.app.live import Live
from matrixinfer.app.peers_collector import PeersCollector
from matrixinfer.app.reload import ReloadCollector, Reloader
from matrixinfer.app.served import served_models
from matrixinfer.app.systemd import Notifier
from matrixinfer.app.workers.worker import MergedMetrics, Sockets, Worker
from matrixinfer.config import Config, PodConfig, SchedulerConfig
from matrixinfer.dashboard.history import History
from matrixinfer.errors import NoPodAvailable
from matrixinfer.gateway import descriptors
from matrixinfer.gateway.access_log import RequestLog
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.credentials import Credentials
from matrixinfer.gateway.fan_out import FanOut
from matrixinfer.gateway.handlers import Admin, Api, Status
from matrixinfer.gateway.ladder_page import LadderPage
from matrixinfer.gateway.models import Models
from matrixinfer.gateway.openapi import OpenApi
from matrixinfer.gateway.passing import Passing
from matrixinfer.gateway.pods_admin import PodsAdmin
from matrixinfer.gateway.protected import protected
from matrixinfer.gateway.proxy import Proxy
from matrixinfer.gateway.reload_admin import ReloadAdmin
from matrixinfer.gateway.retries import Retries
from matrixinfer.gateway.rewrite import BodyRewriter
from matrixinfer.gateway.server import Gateway
from matrixinfer.gateway.upstream import Upstream, upstream
from matrixinfer.pods.engine_api import EngineApi
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.pods.response_search import WAIT_SECONDS, ResponseSearch
from matrixinfer.prompt.finder import TokenizerFinder
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.memory import Memory
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.prompt.samples import SAMPLED_CLASSES
from matrixinfer.routing.audit import Auditor
from matrixinfer.routing.candidates import Candidates
from matrixinfer.routing.decision_log import DecisionLog
from matrixinfer.routing.destinations import Destinations
from matrixinfer.routing.ladder import LadderRecorder
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.prepare import Preparer
from matrixinfer.routing.router import Router
from matrixinfer.routing.routes import Routes
from matrixinfer.routing.sizing import Sizer
from matrixinfer.routing.stored_responses import FindResponse, StoredResponses
from matrixinfer.scheduler.framework import PluginWatch, Services, Trust
from matrixinfer.scheduler.plugin_loader import Installed, discover
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.intervals import Intervals
from matrixinfer.telemetry.log import LogStream
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.outlier_log import OutlierLog
from matrixinfer.telemetry.plugin_log import PluginLog
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.ladder.record import LadderLog
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.channel import Channel, RedisChannel
from matrixinfer.traffic.peers.link import Peers
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.local import LocalChannel
from matrixinfer.traffic.retry_budget import RetryBudget
from matrixinfer.trust.cache_views import Caches, FeedReports
from matrixinfer.trust.media import MediaNames
from matrixinfer.trust.parity import Parity

_NOTED_SECONDS = 10.0
"""How often it is logged that requests are refused."""

log = structlog.get_logger(__name__)


class Service:
    """A running gateway, from its configuration. Use as an async context manager; leaving it drains."""

    def __init__(
        self,
        config: Config,
        log_stream: LogStream | None = None,
        *,
        read: Callable[[], Config] | None = None,
        config_file: Path | None = None,
        notifier: Notifier | None = None,
        worker: Worker | None = None,
    ) -> None:
        """`log_stream` is where the process logs: lines that could not be written are counted in the metrics.

        `read` reads the configuration again, which `config_file` is looked at for. `notifier` reports that.
        `worker` says what this process shares with others, if it is one of several.
        """
        self.config = config
        self._log_stream = log_stream
        self._read = read
        self._config_file = config_file
        self._notifier = Notifier({}, 0) if notifier is None else notifier
        self._worker = worker
        self._channel: Channel | None = None if worker is None else LocalChannel(worker.hub)
        self._live: Live | None = None
        self._reloader: Reloader | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start every part. Raises `ConfigError`, and `OSError` when an address is taken."""
        config, clock = self.config, time.monotonic
        plugins, watch = discover(), PluginLog(clock)
        watch.skipped(plugins.broken)
        self._scheduler = build_scheduler(config.scheduler, plugins, watch)
        self.metrics = Metrics()
        self._memory = Memory(config.limits.memory_bytes)
        self.peer_loads = PeerLoads()
        self.decisions = DecisionLog(config.scheduler.decisions_kept)
        self.traffic = History(clock)
        self._stored = StoredResponses()
        self._history = RoutingHistory(keeps_exact=config.index.kind == "redis")
        self.load = LoadLedger(clock, config.scheduler.pending_seconds)
        self.outliers = Outliers(
            config.outliers,
            clock,
            OutlierLog(self.metrics),
            can_check=config.retries.after_send > 0 and config.limits.max_attempts > 1,
        )
        self._parity = Parity(self.metrics, clock)
        self.ladder = LadderLog(clock, tracks=config.blocks.scheme == "prefix")
        self.engines = engines = Engines(config, self.metrics, history=self._history, ladder=self.ladder, clock=clock)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engines)
            self._remote = RemoteTokenizer(
                engines.session,
                cache_bytes=config.tokenization.cache_bytes,
                on_answered=self.metrics.engine_tokenized,
                clock=clock,
            )
            tokenizers = TokenizerManager(
                config.models,
                config.tokenization,
                self._remote,
                memory=self._memory,
                block_size=engines.blocks.block_size,
            )
            await stack.enter_async_context(tokenizers)
            self._finder = self._find_tokenizers(tokenizers, clock)
            self.router = self._router(tokenizers, clock)
            self._upstream = stack.enter_context(
                upstream(config.limits, self.metrics, engines.shortages, engines.tls.at)
            )
            await self._open_peers(stack)
            self._register_collectors(tokenizers)
            self.watching = await stack.enter_async_context(
                engines.watching(on_gone=self.router.forget, on_models_changed=self.router.keep_models)
            )
            self.pods: PodSources = await stack.enter_async_context(
                pod_sources(config.discovery, self, engines.registry, self.metrics, self._in_flight)
            )
            await stack.enter_async_context(self._finder)
            request_log = await open_access_log(config, self.metrics, stack)
            gate = await stack.enter_async_context(access_gate(config, self.metrics.access, engines.setup.store))
            self.gateway = await stack.enter_async_context(self._gateway(self._upstream, request_log, gate))
            await self._open_reloads(stack, plugins, watch)
            if self._worker is not None:
                self._worker.end_with_supervisor()
            self._stack = stack.pop_all()
        pods = len(engines.registry.pods)
        if self._worker is None:
            log.info("gateway_started", listen=self.gateway.url, admin=self.gateway.admin_url, pods=pods)
        else:
            log.info("worker_started", listen=self.gateway.url, pods=pods)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        drain = self.config.drain if self._live is None else self._live.config.drain
        log.info("gateway_stopping", delay_seconds=drain.delay_seconds, timeout_seconds=drain.timeout_seconds)
        try:
            return await self._stack.__aexit__(kind, error, trace)
        finally:
            log.info("gateway_stopped")

    def delay_drain(self) -> None:
        """When this ends, go on for `drain.delaySeconds` before it takes no more requests."""
        self.gateway.delay_drain()

    def reload_soon(self) -> None:
        """Read the configuration again. No effect before the start, and where it was not read from anywhere."""
        if self._reloader is not None:
            self._reloader.reload_soon()

    def join(self, config: PodConfig) -> None:
        """Add a pod. Raises `ValueError` if there is one of that name."""
        self.watching.join(config)

    def leave(self, name: str) -> None:
        """Remove a pod, and what is kept about it; its requests may finish. Does nothing if there is no such pod."""
        url = next((pod.url for pod in self.engines.registry.pods if pod.name == name), None)
        self.watching.leave(name)
        if url is not None:
            self._upstream.forget(url)

    def _in_flight(self, pod: Pod) -> int:
        return sum(self.load.in_flight(endpoint.name) for endpoint in pod.endpoints)

    async def _open_reloads(self, stack: AsyncExitStack, plugins: Installed, watch: PluginWatch) -> None:
        """Read the configuration again when that is wanted, if it can be read."""
        self._live = Live(
            config=self.config,
            scheduler=self._scheduler,
            build=lambda config: build_scheduler(config, plugins, watch),
            router=self.router,
            sizer=self._sizer,
            bodies=self._bodies,
            proxy=self._proxy,
            retries=self._retries,
            gateway=self.gateway,
            outliers=self.outliers,
            watching=self.watching,
            pods=self.pods,
            pods_admin=self._pods_admin,
        )
        if self._read is not None:
            reloader = Reloader(
                self.config,
                self._read,
                self._live.apply,
                file=self._config_file,
                on_begin=self._notifier.reloading,
                on_end=self._notifier.ready,
            )
            self._reloader = await stack.enter_async_context(reloader)
        self.metrics.register(ReloadCollector(self._reloader))

    async def _reload(self) -> Mapping[str, object]:
        if self._reloader is None:
            raise NoPodAvailable("The gateway is still starting.")
        return asdict(await self._reloader.reload("admin"))

    def _router(self, tokenizers: TokenizerManager, clock: Callable[[], float]) -> Router:
        engines, config = self.engines, self.config.scheduler
        lookup = Lookup(engines.registry, engines.setup.index, engines.setup.caches)
        sizer = self._sizer = Sizer(max_tokens=config.max_prefix_tokens, reads_bytes=self._scheduler.reads_bytes)
        media = MediaNames(clock)
        return Router(
            registry=engines.registry,
            preparer=Preparer(
                engines.registry,
                tokenizers,
                engines.blocks,
                lookup,
                self._parity,
                sizer,
                media=media,
                max_prefix_tokens=config.max_prefix_tokens,
                destinations=Destinations(
                    engines.registry, engines.find_model, self._find_response(), routes=Routes(self.config.routes)
                ),
                clock=clock,
            ),
            candidates=Candidates(
                engines.registry,
                lookup,
                self.load,
                self._history,
                config.weights,
                self.outliers,
                self.peer_loads,
                reuse=engines.drift.reuse,
                slow_start_seconds=self.config.discovery.slow_start_seconds,
            ),
            scheduler=self._scheduler,
            load=self.load,
            history=self._history,
            outliers=self.outliers,
            auditor=Auditor(engines.feeds, self._parity, engines.drift, lookup, engines.blocks, sizer, media),
            decisions=self.decisions,
            metrics=self.metrics,
            ladder=LadderRecorder(self.ladder, clock, has_rule=self._has_rule),
            clock=clock,
            watch=None if self.config.admin is None else self.traffic,
        )

    def _has_rule(self, endpoint: str) -> bool:
        """Whether an endpoint's engine does not reuse every prefix that it holds."""
        return self.engines.setup.caches.rule_of(endpoint) is not None

    def _find_response(self) -> FindResponse:
        """Finds the engine that stores a response."""
        engines = self.engines
        api = EngineApi(engines.session, WAIT_SECONDS)
        return FindResponse(self._stored, ResponseSearch(api, lambda: engines.registry.pods))

    def _find_tokenizers(self, tokenizers: TokenizerManager, clock: Callable[[], float]) -> TokenizerFinder:
        engines, config = self.engines, self.config
        return TokenizerFinder(
            config.models,
            config.tokenization,
            tokenizers,
            RemoteTokenizer(engines.session, rests=False, clock=clock),
            fleet=partial(served_models, engines.registry),
            distrusts=lambda model: any(self._parity.is_approximate(model, each) for each in SAMPLED_CLASSES),
            block_size=engines.blocks.block_size,
            clock=clock,
        )

    def _tokenizer_views(self) -> Mapping[str, Mapping[str, object]]:
        """Where the token ids of each model come from, and what asking for them costs."""
        costs = {name: cost.view() for name, cost in self._remote.costs.items()}
        return {name: {**source.view(), "asking": costs.get(name)} for name, source in self._finder.sources.items()}

    async def _open_peers(self, stack: AsyncExitStack) -> None:
        """Share load with other gateways and workers, if there may be any."""
        store, channel = self.engines.setup.store, self._channel
        if store is not None and store.config.share_load:
            channel = RedisChannel(store)  # where the other workers are, too
        if channel is None:
            return
        peers = Peers(
            channel,
            loads=self.peer_loads,
            load=self.load,
            history=self._history,
            trust_of=partial(_trust_of, self.engines.registry, self.engines.setup.caches),
            outliers=self.outliers,
        )
        self.metrics.register(PeersCollector(await stack.enter_async_context(peers)))

    def _register_collectors(self, tokenizers: TokenizerManager) -> None:
        kept = {
            "decisions": self.decisions.__len__,
            "dashboard_prefixes": self.traffic.__len__,
            "recent_blocks": self._history.__len__,
            "recent_chunks": lambda: self._history.chunks,
            "pending_blocks": self.load.__len__,
            "drift_endpoints": self.engines.drift.__len__,
            "outlier_endpoints": self.outliers.__len__,
            "ladder_blocks": self.ladder.__len__,
            "parity_samples": self._parity.sampling.__len__,
            "stored_responses": self._stored.__len__,
            "late_prompts": lambda: tokenizers.late,
            "working_prompts": lambda: tokenizers.working,
        }
        if self._log_stream is not None:
            self.metrics.register(LogCollector(self._log_stream))
        self.metrics.register(IndexCollector(self.engines.setup.index))
        self.metrics.register(KeptCollector(kept))
        self.metrics.register(MemoryCollector(self._memory))
        self.metrics.register(TokenCacheCollector(tokenizers))
        self.metrics.register(TokenSourceCollector(lambda: self._finder.sources))
        self.metrics.register(PluginCollector(lambda: self._scheduler if self._live is None else self._live.scheduler))
        self.metrics.register(LadderCollector(self.ladder))

    def _gateway(self, connections: Upstream, request_log: RequestLog | None, gate: Gate | None) -> Gateway:
        engines, config, metrics = self.engines, self.config, self.metrics
        draining = asyncio.Event()
        status = Status(engines.registry, metrics, draining).routes()
        rewriter = BodyRewriter(engines.registry, adds_usage=config.drift.inject_usage)
        budget = RetryBudget(config.retries.budget_share, config.retries.budget_per_second, time.monotonic)
        retries = self._retries = Retries(config.retries, budget, random.Random())  # noqa: S311 - spreads retries, protects nothing
        strips = () if config.access is None else config.access.strip_headers
        credentials = Credentials(engines.keys.at, always=config.engine_keys.send == "always", strips=strips)
        proxy = self._proxy = Proxy(
            connections,
            retries,
            rewriter,
            metrics,
            config.limits,
            draining,
            credentials,
            config.api.sse_keep_alive_seconds,
        )
        bodies = self._bodies = Bodies(config.limits, self._memory, Intervals(_NOTED_SECONDS, time.monotonic))
        api = Api(self.router, proxy, metrics, bodies, request_log, gate, self._stored)
        fan_out = FanOut(
            engines.registry, connections, bodies, config.limits, credentials, changed=self.watching.ask_again
        )
        passing = Passing(config.api.paths, api.dispatch, fan_out, gate)
        models = Models(engines.registry, engines.find_model, Routes(config.routes).names())
        feeds = FeedReports(engines.feeds, engines.setup.caches, engines.drift.reuse)
        admin = Admin(
            self.router,
            engines.registry,
            self.decisions,
            feeds,
            self.outliers,
            self._parity,
            bodies,
            self._tokenizer_views,
            unmatched=engines.setup.unmatched,
        )
        pages = dashboard(
            config,
            engines,
            history=self.traffic,
            outliers=self.outliers,
            load=self.load,
            decisions=self.decisions,
            draining=draining,
            api=lambda: self.gateway.url,
        )
        reload_admin = ReloadAdmin(None if self._read is None else self._reload)
        pods_admin = self._pods_admin = PodsAdmin(self.pods.fleet, drain_seconds=config.discovery.drain_seconds)
        public = status if config.public_metrics else {path: way for path, way in status.items() if path != "/metrics"}
        if self._worker is not None and config.public_metrics:
            public = {**public, "/metrics": {"GET": MergedMetrics(self._worker).expose}}
        served = {**api.routes(), **protected(models.routes(), gate), **public, **passing.routes()}
        return Gateway(
            config,
            api={**served, **OpenApi(served).routes()},
            admin={
                **({} if self._worker is None else Sockets(self._worker, lambda: self.gateway).routes()),
                **admin.routes(),
                **LadderPage(self.ladder.since).routes(),
                **pods_admin.routes(),
                **reload_admin.routes(),
                **pages.routes(),
                **status,
            },
            draining=draining,
            max_connections=config.connections.max or descriptors.for_clients(),
            sockets=None if self._worker is None else self._worker.sockets(),
        )


def _trust_of(registry: PodRegistry, caches: Caches, name: str) -> Trust | None:
    """How far an endpoint's events are believed; None if there is no such endpoint."""
    if not registry.is_endpoint(name):
        return None
    cache = caches.of(name)
    return "none" if cache is None else cache.trust


def build_scheduler(
    config: SchedulerConfig, plugins: Installed | None = None, watch: PluginWatch | None = None
) -> Scheduler:
    """The scheduler with built-in and installed plugins. Raises `ConfigError`."""
    plugins = discover() if plugins is None else plugins
    generator = random.Random(config.seed)  # noqa: S311 - breaks ties, protects nothing
    services = Services(clock=time.perf_counter, rng=generator)
    return Scheduler(config, services, plugins, broken=plugins.broken, watch=watch)
