"""The agent: follows the KV events of engines beside it, and writes what they hold into Redis for all gateways."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import msgspec
import structlog

from matrixinfer.app.collectors import FeedCollector
from matrixinfer.app.index_setup import Backend, token_blocks
from matrixinfer.app.redis_collector import RedisCollector
from matrixinfer.config import Config, split_address
from matrixinfer.gateway.handlers import Status
from matrixinfer.gateway.listener import Listener
from matrixinfer.gateway.session import client_session
from matrixinfer.index.redis.dry_run import DryRunIndex
from matrixinfer.kvevents.follower import EventFollower
from matrixinfer.kvevents.subscriber import Subscriber
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.pods.watcher import PodWatcher
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.drift import Drift

FIRST_LOOK_SECONDS = 5.0
"""How long the start waits for every engine's first answer."""

log = structlog.get_logger(__name__)


class Agent:
    """Follows every pod of a configuration. Use as an async context manager; leaving it gives the pods to the next writer.

    `listen` is the address of `/health`, `/ready` and `/metrics`; None for none. With `dry_run` what would be written goes
    there instead, and Redis is not asked.
    """

    def __init__(self, config: Config, *, listen: str | None, dry_run: DryRunIndex | None = None) -> None:
        index = msgspec.structs.replace(config.index, kind="redis", writer="gateway", warm_start=False)
        self.config = msgspec.structs.replace(config, index=index)
        self._listen = listen
        self._dry_run = dry_run
        self._stack = AsyncExitStack()
        self.url: str | None = None
        """Base URL of `/metrics`."""

    async def __aenter__(self) -> Self:
        """Start to follow and to write. Raises `ConfigError`, and `OSError` when the address is taken."""
        config, clock = self.config, time.monotonic
        blocks = token_blocks(config.blocks)
        registry = PodRegistry(config.pods, config.models, config.pod_watch, clock=clock)
        self.backend = Backend(config, blocks, models=registry.base_models)
        metrics = Metrics()
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(client_session(config.limits))
            subscriber = await stack.enter_async_context(
                Subscriber(index=self._dry_run or self.backend.index, blocks=blocks)
            )
            self.feeds = subscriber.feeds
            drift = Drift(metrics, subscriber.resync, clock)
            self.backend.attach(subscriber.feeds, drift)
            await stack.enter_async_context(self._dry_run or self.backend)
            follow = EventFollower(subscriber, config, on_followed=self.backend.follow)
            watcher = PodWatcher(registry, session, config.pod_watch, on_discovered=follow)
            await stack.enter_async_context(watcher)
            await watcher.first_round(FIRST_LOOK_SECONDS)
            for pod in registry.pods:
                if pod.served is None:  # it may never tell, and then it is never discovered
                    follow(pod)
            metrics.register(FeedCollector(subscriber.feeds, drift.doubts))
            if self.backend.redis is not None:
                metrics.register(RedisCollector(self.backend.redis, self.backend.states))
            if self._listen is not None:
                draining = asyncio.Event()
                routes = Status(registry, metrics, draining).routes()
                listener = Listener(*split_address(self._listen, path="--listen"), routes, draining)
                self.url = (await stack.enter_async_context(listener)).url
            self._stack = stack.pop_all()
        where = None if self.backend.store is None else self.backend.store.config.where
        log.info("agent", pods=len(config.pods), redis=where, listen=self.url, dry_run=self._dry_run is not None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)
