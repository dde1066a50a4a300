"""Puts the gateway together: the only place that knows every part."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self, cast

import structlog

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import Config, SchedulerConfig
from matrixinfer.drift import Drift
from matrixinfer.gateway.collectors import FeedCollector, IndexCollector, PluginCollector, TokenCacheCollector
from matrixinfer.gateway.server import Gateway
from matrixinfer.gateway.session import client_session
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.subscriber import FeedSource, Subscriber
from matrixinfer.parity import Parity
from matrixinfer.plugin_loader import discover
from matrixinfer.pods.registry import EngineMetrics, Pod, PodRegistry
from matrixinfer.pods.watcher import PodWatcher
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.router import Router
from matrixinfer.scheduler.framework import Services
from matrixinfer.scheduler.history import RoutingHistory
from matrixinfer.scheduler.load import LoadLedger
from matrixinfer.scheduler.plugins.kvcache_aware import KvCacheAware
from matrixinfer.scheduler.profile import arguments_of
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.metrics import Metrics

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
        hashing = cast("KvCacheAware.Args", arguments_of(config.scheduler, KvCacheAware))
        blocks = TokenBlockProcessor(hashing.block_size_to_hash, hashing.hash_scheme)
        index = MemoryIndex(max_blocks=config.index.max_blocks, prefix_closed=blocks.scheme == "prefix")
        registry = PodRegistry(config.pods, config.models, config.pod_watch, clock=clock)
        metrics, history = Metrics(), RoutingHistory()
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(client_session(config.limits))
            tokenizers = TokenizerManager(
                config.models, config.tokenization, RemoteTokenizer(session), block_size=blocks.block_size
            )
            await stack.enter_async_context(tokenizers)
            subscriber = await stack.enter_async_context(Subscriber(index=index, blocks=blocks, history=history))
            drift = Drift(metrics, subscriber.resync, clock)
            self.router = Router(
                registry=registry,
                tokenizers=tokenizers,
                blocks=blocks,
                index=index,
                feeds=subscriber.feeds,
                scheduler=scheduler,
                load=LoadLedger(clock, config.scheduler.assumed_seconds),
                metrics=metrics,
                parity=Parity(metrics, clock),
                drift=drift,
                history=history,
                config=config.scheduler,
                injects_usage=config.drift.inject_usage,
                clock=clock,
            )
            metrics.register(IndexCollector(index))
            metrics.register(FeedCollector(subscriber.feeds, drift.doubts))
            metrics.register(TokenCacheCollector(tokenizers))
            metrics.register(PluginCollector(scheduler))

            follow = EventFollower(subscriber, config)
            watcher = PodWatcher(
                registry, session, config.pod_watch, on_discovered=follow, on_measured=partial(_measured, drift)
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


def _measured(drift: Drift, pod: Pod, metrics: EngineMetrics) -> None:
    """Hold every rank's own count of hits against what the index has said of it."""
    for endpoint in pod.endpoints:
        shown = metrics if endpoint.rank is None else metrics.ranks.get(endpoint.rank)
        if shown is not None and shown.prefix_hits is not None:
            drift.measured(endpoint.name, shown.prefix_hits, began_at=metrics.read_at)


def build_scheduler(config: SchedulerConfig) -> Scheduler:
    """The scheduler with built-in and installed plugins. Raises `ConfigError` or `PluginError`."""
    generator = random.Random(config.seed)  # noqa: S311 - breaks ties, protects nothing
    return Scheduler(config, Services(clock=time.perf_counter, rng=generator), discover())


class EventFollower:
    """Follows the KV events of pods by what they tell; call it with a pod whenever that may have changed."""

    def __init__(self, subscriber: Subscriber, config: Config) -> None:
        self._subscriber = subscriber
        self._models = [model.name for model in config.models]
        scorers = config.scheduler.plugins.score.enabled
        self._wanted = any((ref if isinstance(ref, str) else ref.name) == KvCacheAware.name for ref in scorers)
        self._warned: set[str] = set()
        self._following: dict[str, frozenset[str]] = {}  # pod -> names of its feeds

    def __call__(self, pod: Pod) -> None:
        """Follow the pod where it publishes now, under the model that it serves now."""
        sources = {source.name: source for source in feed_sources(pod, self._models)}
        for name in self._following.get(pod.name, frozenset()) - sources.keys():
            self._subscriber.unfollow(name)
        for source in sources.values():
            self._subscriber.follow(source)
        self._following[pod.name] = frozenset(sources)
        if not sources and self._wanted and pod.kv_sources is not None and pod.name not in self._warned:
            self._warned.add(pod.name)
            reason = "its model is not known" if pod.kv_sources else "it publishes no KV events"
            log.warning("kv_events_not_followed", pod=pod.name, reason=reason)


def feed_sources(pod: Pod, models: Sequence[str]) -> Iterator[FeedSource]:
    """Where a pod publishes, one for each data-parallel rank; nothing when nowhere or not known.

    A pod that does not tell its model (it may want an API key) has the only one of `models`, those configured.
    """
    model = pod.base_model or (models[0] if len(models) == 1 else None)
    if not pod.kv_sources or model is None:
        return
    for rank, source in enumerate(pod.kv_sources):
        yield FeedSource(
            pod=pod.name,
            rank=rank if len(pod.kv_sources) > 1 else None,
            model=model,
            endpoint=source.endpoint,
            replay_endpoint=source.replay_endpoint,
            topic=source.topic,
        )
