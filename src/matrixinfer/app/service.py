"""The gateway's composition root: it creates every part, connects them, and knows nothing else."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

import structlog

from matrixinfer.app.collectors import IndexCollector, KeptCollector, PluginCollector, TokenCacheCollector
from matrixinfer.app.engines import Engines
from matrixinfer.app.peers_collector import PeersCollector
from matrixinfer.config import Config, PodConfig, SchedulerConfig
from matrixinfer.gateway.handlers import Admin, Api, Status
from matrixinfer.gateway.proxy import Proxy
from matrixinfer.gateway.rewrite import BodyRewriter
from matrixinfer.gateway.server import Gateway
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.routing.audit import Auditor
from matrixinfer.routing.candidates import Candidates
from matrixinfer.routing.decision_log import DecisionLog
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.prepare import Preparer
from matrixinfer.routing.router import Router
from matrixinfer.scheduler.framework import PluginWatch, Services, Trust
from matrixinfer.scheduler.plugin_loader import Installed, discover
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.plugin_log import PluginLog
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.link import Peers
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.trust.cache_views import Caches, FeedReports
from matrixinfer.trust.parity import Parity

log = structlog.get_logger(__name__)


class Service:
    """A running gateway, from its configuration. Use as an async context manager; leaving it drains."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start every part. Raises `ConfigError`, and `OSError` when an address is taken."""
        config, clock = self.config, time.monotonic
        plugins, watch = discover(), PluginLog(clock)
        watch.skipped(plugins.broken)
        self._scheduler = build_scheduler(config.scheduler, plugins, watch)
        self.metrics = Metrics()
        self.peer_loads = PeerLoads()
        self.decisions = DecisionLog(config.scheduler.decisions_kept)
        self._history = RoutingHistory(keeps_exact=config.index.kind == "redis")
        self.load = LoadLedger(clock, config.scheduler.pending_seconds)
        self._parity = Parity(self.metrics, clock)
        self.engines = engines = Engines(config, self.metrics, history=self._history, clock=clock)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engines)
            tokenizers = TokenizerManager(
                config.models,
                config.tokenization,
                RemoteTokenizer(engines.session),
                block_size=engines.blocks.block_size,
            )
            await stack.enter_async_context(tokenizers)
            self.router = self._router(tokenizers, clock)
            await self._open_peers(stack)
            self._register_collectors(tokenizers)
            self.watching = await stack.enter_async_context(
                engines.watching(on_gone=self.router.forget, on_models_changed=self.router.keep_models)
            )
            self.gateway = await stack.enter_async_context(self._gateway())
            self._stack = stack.pop_all()
        log.info("gateway_started", listen=self.gateway.url, admin=self.gateway.admin_url, pods=len(config.pods))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        log.info("gateway_stopping", drain_seconds=self.config.limits.drain_seconds)
        return await self._stack.__aexit__(kind, error, trace)

    def join(self, config: PodConfig) -> None:
        """Add a pod. Raises `ValueError` if there is one of that name."""
        self.watching.join(config)

    def leave(self, name: str) -> None:
        """Remove a pod, and what is kept about it; its requests may finish. Does nothing if there is no such pod."""
        self.watching.leave(name)

    def _router(self, tokenizers: TokenizerManager, clock: Callable[[], float]) -> Router:
        engines, config = self.engines, self.config.scheduler
        lookup = Lookup(engines.registry, engines.setup.index, engines.setup.caches)
        return Router(
            registry=engines.registry,
            preparer=Preparer(
                engines.registry,
                tokenizers,
                engines.blocks,
                lookup,
                self._parity,
                max_prefix_tokens=config.max_prefix_tokens,
                clock=clock,
            ),
            candidates=Candidates(engines.registry, lookup, self.load, self._history, config.weights, self.peer_loads),
            scheduler=self._scheduler,
            load=self.load,
            history=self._history,
            auditor=Auditor(engines.feeds, self._parity, engines.drift, lookup, engines.blocks),
            decisions=self.decisions,
            metrics=self.metrics,
            clock=clock,
        )

    async def _open_peers(self, stack: AsyncExitStack) -> None:
        """Share load with other gateways, if the configuration says so."""
        store = self.engines.setup.store
        if store is None or not store.config.share_load:
            return
        trust_of = partial(_trust_of, self.engines.registry, self.engines.setup.caches)
        peers = Peers(store, loads=self.peer_loads, load=self.load, history=self._history, trust_of=trust_of)
        self.metrics.register(PeersCollector(await stack.enter_async_context(peers)))

    def _register_collectors(self, tokenizers: TokenizerManager) -> None:
        kept = {
            "decisions": self.decisions.__len__,
            "recent_blocks": self._history.__len__,
            "pending_blocks": self.load.__len__,
            "drift_endpoints": self.engines.drift.__len__,
            "parity_samples": self._parity.__len__,
        }
        self.metrics.register(IndexCollector(self.engines.setup.index))
        self.metrics.register(KeptCollector(kept))
        self.metrics.register(TokenCacheCollector(tokenizers))
        self.metrics.register(PluginCollector(self._scheduler))

    def _gateway(self) -> Gateway:
        engines, config, metrics = self.engines, self.config, self.metrics
        draining = asyncio.Event()
        status = Status(engines.registry, metrics, draining).routes()
        rewriter = BodyRewriter(engines.registry, adds_usage=config.drift.inject_usage)
        proxy = Proxy(engines.session, rewriter, metrics, config.limits, draining)
        api = Api(self.router, engines.registry, proxy, metrics, config.limits)
        feeds = FeedReports(engines.feeds, engines.setup.caches)
        admin = Admin(
            self.router,
            engines.registry,
            self.decisions,
            feeds,
            self._parity,
            config.limits,
            unmatched=engines.setup.unmatched,
        )
        return Gateway(config, api={**api.routes(), **status}, admin={**admin.routes(), **status}, draining=draining)


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
