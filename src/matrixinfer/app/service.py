"""The gateway's composition root: it creates every part, connects them, and knows nothing else."""

from __future__ import annotations

import asyncio
import random
import time
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
        scheduler = build_scheduler(config.scheduler, plugins, watch)
        self.metrics = metrics = Metrics()
        history = RoutingHistory(keeps_exact=config.index.kind == "redis")
        load = LoadLedger(clock, config.scheduler.pending_seconds)
        self.peer_loads = peer_loads = PeerLoads()
        self.decisions = decisions = DecisionLog(config.scheduler.decisions_kept)
        parity = Parity(metrics, clock)
        self.engines = engines = Engines(config, metrics, history=history, clock=clock)
        registry, blocks, drift = engines.registry, engines.blocks, engines.drift
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engines)
            tokenizers = TokenizerManager(
                config.models, config.tokenization, RemoteTokenizer(engines.session), block_size=blocks.block_size
            )
            await stack.enter_async_context(tokenizers)
            lookup = Lookup(registry, engines.setup.index, engines.setup.caches)
            self.router = Router(
                registry=registry,
                preparer=Preparer(
                    registry,
                    tokenizers,
                    blocks,
                    lookup,
                    parity,
                    max_prefix_tokens=config.scheduler.max_prefix_tokens,
                    clock=clock,
                ),
                candidates=Candidates(registry, lookup, load, history, config.scheduler.weights, peer_loads),
                scheduler=scheduler,
                load=load,
                history=history,
                auditor=Auditor(engines.feeds, parity, drift, lookup, blocks),
                decisions=decisions,
                metrics=metrics,
                clock=clock,
            )
            store = engines.setup.store
            if store is not None and store.config.share_load:
                trust_of = partial(_trust_of, registry, engines.setup.caches)
                peers = Peers(store, loads=peer_loads, load=load, history=history, trust_of=trust_of)
                metrics.register(PeersCollector(await stack.enter_async_context(peers)))
            kept = {
                "decisions": decisions.__len__,
                "recent_blocks": history.__len__,
                "pending_blocks": load.__len__,
                "drift_endpoints": drift.__len__,
                "parity_samples": parity.__len__,
            }
            metrics.register(IndexCollector(engines.setup.index))
            metrics.register(KeptCollector(kept))
            metrics.register(TokenCacheCollector(tokenizers))
            metrics.register(PluginCollector(scheduler))
            self.watching = await stack.enter_async_context(
                engines.watching(on_gone=self.router.forget, on_models_changed=self.router.keep_models)
            )
            draining = asyncio.Event()
            status = Status(registry, metrics, draining).routes()
            rewriter = BodyRewriter(registry, adds_usage=config.drift.inject_usage)
            proxy = Proxy(engines.session, rewriter, metrics, config.limits, draining)
            api = Api(self.router, registry, proxy, metrics, config.limits)
            feeds = FeedReports(engines.feeds, engines.setup.caches)
            admin = Admin(self.router, registry, decisions, feeds, parity, config.limits)
            self.gateway = await stack.enter_async_context(
                Gateway(config, api={**api.routes(), **status}, admin={**admin.routes(), **status}, draining=draining)
            )
            self._stack = stack.pop_all()
        log.info("gateway_started", listen=self.gateway.url, admin=self.gateway.admin_url, pods=len(config.pods))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    def join(self, config: PodConfig) -> None:
        """Add a pod. Raises `ValueError` if there is one of that name."""
        self.watching.join(config)

    def leave(self, name: str) -> None:
        """Remove a pod, and what is kept about it; its requests may finish. Does nothing if there is no such pod."""
        self.watching.leave(name)


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
