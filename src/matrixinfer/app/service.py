"""Puts the gateway together: the only place that knows every part."""

from __future__ import annotations

import random
import time
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

import structlog

from matrixinfer.app.collectors import (
    FeedCollector,
    IndexCollector,
    KeptCollector,
    PluginCollector,
    TokenCacheCollector,
)
from matrixinfer.app.index_setup import Backend, token_blocks
from matrixinfer.app.peers_collector import PeersCollector
from matrixinfer.app.redis_collector import RedisCollector
from matrixinfer.config import Config, PodConfig, SchedulerConfig, bare_pod
from matrixinfer.gateway.server import Gateway
from matrixinfer.gateway.session import client_session
from matrixinfer.kvevents.follower import EventFollower
from matrixinfer.kvevents.subscriber import Subscriber
from matrixinfer.pods.registry import EngineMetrics, Pod, PodRegistry
from matrixinfer.pods.watcher import PodWatcher
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.routing.router import Router
from matrixinfer.scheduler.framework import Services, Trust
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.link import Peers
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.trust.cache_views import Caches
from matrixinfer.trust.drift import Drift, Lookups
from matrixinfer.trust.parity import Parity

FIRST_LOOK_SECONDS = 5.0
"""How long the start waits for every pod's first answer."""

log = structlog.get_logger(__name__)


class Service:
    """A running gateway, from its configuration. Use as an async context manager; leaving it drains."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start every part. Raises `ConfigError`, and `OSError` when an address is taken."""
        config, clock = self.config, time.monotonic
        scheduler = build_scheduler(config.scheduler)
        blocks = token_blocks(config.scheduler)
        registry = PodRegistry(config.pods, config.models, config.pod_watch, clock=clock)
        backend = Backend(config, blocks, models=registry.base_models)
        metrics, history, peer_loads = Metrics(), RoutingHistory(), PeerLoads()
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(client_session(config.limits))
            tokenizers = TokenizerManager(
                config.models, config.tokenization, RemoteTokenizer(session), block_size=blocks.block_size
            )
            await stack.enter_async_context(tokenizers)
            subscriber = await stack.enter_async_context(
                Subscriber(index=backend.index, blocks=blocks, history=history)
            )
            drift, parity = Drift(metrics, subscriber.resync, clock), Parity(metrics, clock)
            caches = backend.attach(subscriber.feeds, drift)
            await stack.enter_async_context(backend)
            load = LoadLedger(clock, config.scheduler.pending_seconds)
            self.router = Router(
                registry=registry,
                tokenizers=tokenizers,
                blocks=blocks,
                index=backend.index,
                feeds=subscriber.feeds,
                caches=caches,
                scheduler=scheduler,
                load=load,
                peers=peer_loads,
                metrics=metrics,
                parity=parity,
                drift=drift,
                history=history,
                config=config.scheduler,
                injects_usage=config.drift.inject_usage,
                remembers=config.index.kind == "redis",
                clock=clock,
            )
            if backend.store is not None and backend.store.config.share_load:
                trust_of = partial(_trust_of, registry, caches)
                peers = Peers(backend.store, loads=peer_loads, load=load, history=history, trust_of=trust_of)
                metrics.register(PeersCollector(await stack.enter_async_context(peers)))
            metrics.register(IndexCollector(backend.index))
            if backend.redis is not None:
                metrics.register(RedisCollector(backend.redis, backend.states))
            metrics.register(FeedCollector(subscriber.feeds, drift.doubts))
            kept = {
                "decisions": self.router.decisions.__len__,
                "recent_blocks": history.__len__,
                "pending_blocks": load.__len__,
                "drift_endpoints": drift.__len__,
                "parity_samples": parity.__len__,
            }
            metrics.register(KeptCollector(kept))
            metrics.register(TokenCacheCollector(tokenizers))
            metrics.register(PluginCollector(scheduler))

            self._follow = follow = EventFollower(
                subscriber,
                config,
                on_gone=self.router.fleet.forget,
                on_followed=backend.follow,
                listens=backend.follows,
            )
            self._watcher = watcher = PodWatcher(
                registry,
                session,
                config.pod_watch,
                on_discovered=self._discovered,
                on_measured=partial(_measured, drift),
            )
            await stack.enter_async_context(watcher)
            await watcher.first_round(FIRST_LOOK_SECONDS)
            for pod in registry.pods:
                if pod.served is None:  # it may never tell, and then it is never discovered
                    follow(pod)
            self.gateway = await stack.enter_async_context(Gateway(config, self.router, metrics, session))
            self._stack = stack.pop_all()
        log.info("serving", listen=self.gateway.url, admin=self.gateway.admin_url, pods=len(config.pods))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    def join(self, config: PodConfig) -> None:
        """A pod comes. Raises `ValueError` where there is one of its name."""
        pod = self.router.registry.join(bare_pod(config))
        if pod.kv_sources is not None:  # it may never tell more
            self._follow(pod)
        self._watcher.watch(pod)

    def leave(self, name: str) -> None:
        """A pod goes, and what is kept of it; requests that are there may end. Nothing happens where there is none."""
        pod = self.router.registry.leave(name)
        if pod is not None:
            self._watcher.unwatch(name)
            self._follow.leave(pod)
            self.router.fleet.keep_models()

    def _discovered(self, pod: Pod) -> None:
        self._follow(pod)
        self.router.fleet.keep_models()


def _trust_of(registry: PodRegistry, caches: Caches, name: str) -> Trust | None:
    """How far an endpoint's events are believed; None where there is no such endpoint."""
    if not registry.is_endpoint(name):
        return None
    cache = caches.of(name)
    return "none" if cache is None else cache.trust


def _measured(drift: Drift, pod: Pod, metrics: EngineMetrics) -> None:
    """Hold every rank's own counts against what the index has said of it."""
    for endpoint in pod.endpoints:
        shown = metrics if endpoint.rank is None else metrics.ranks.get(endpoint.rank)
        if shown is not None and shown.prefix_hits is not None:
            counted = Lookups(shown.prefix_hits, shown.prefix_queries)
            drift.measured(endpoint.name, counted, began_at=metrics.read_at)


def build_scheduler(config: SchedulerConfig) -> Scheduler:
    """The scheduler with built-in and installed plugins. Raises `ConfigError` or `PluginError`."""
    generator = random.Random(config.seed)  # noqa: S311 - breaks ties, protects nothing
    return Scheduler(config, Services(clock=time.perf_counter, rng=generator), discover())
