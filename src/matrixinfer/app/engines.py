"""The engines of a configuration, watched and followed: what the gateway and the agent have in common."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Self

import aiohttp

from matrixinfer.app.collectors import FeedCollector, PodCollector
from matrixinfer.app.index_setup import IndexSetup, token_blocks
from matrixinfer.app.redis_collector import RedisCollector
from matrixinfer.app.unserved import UnservedModels
from matrixinfer.config import Config, ModelConfig, PodConfig, PodWatchConfig, bare_pod
from matrixinfer.index.redis.dry_run import DryRunIndex
from matrixinfer.index.watched import WatchedIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.follower import EventFollower
from matrixinfer.kvevents.load_follower import LoadFollower
from matrixinfer.kvevents.states import SETTLED
from matrixinfer.kvevents.subscriber import Subscriber
from matrixinfer.pods.engine_keys import EngineKeys
from matrixinfer.pods.engine_tls import EngineTls
from matrixinfer.pods.model_search import ModelSearch
from matrixinfer.pods.registry import EngineMetrics, Pod, PodRegistry
from matrixinfer.pods.session import client_session
from matrixinfer.pods.watcher import PodWatcher
from matrixinfer.telemetry.loop_watch import LoopWatch
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.shortages import Shortages
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.ladder.record import LadderLog
from matrixinfer.trust.drift import Drift, Lookups

FIRST_LOOK_SECONDS = 5.0
"""How long the start waits until every pod has answered or failed once."""
OTHERS_SECONDS = 0.5
"""How long it waits for the others once a pod has answered."""
_EMPTY = ("weights_offloaded", "discard_all")
"""Kinds of sleep without a KV cache."""
"""Otherwise batches are on their way, and the next reading of the metrics comes after them."""


class Engines:
    """Everything that looks at engines: registry, watcher, event feeds, index, drift.

    Use as an async context manager: it opens the HTTP session, the event sockets and the connection to Redis. Nobody is
    asked anything before `watching` is entered. With `dry_run` events are written there instead of to the index.
    """

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        *,
        history: RoutingHistory | None = None,
        dry_run: DryRunIndex | None = None,
        ladder: LadderLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocks = token_blocks(config.blocks)
        self.shortages = Shortages(metrics, clock)
        self.registry = PodRegistry(config.pods, config.models, config.pod_watch, clock=clock)
        self.keys = EngineKeys(config, self.registry)
        self.tls = EngineTls(config, self.registry)
        self.feeds: dict[str, PodFeed] = {}
        """The feed of each endpoint that this process follows; the subscriber fills it."""
        self.drift = Drift(metrics, self._resync, clock, self._reuses_less)
        self.setup = IndexSetup(
            config,
            self.blocks,
            feeds=self.feeds,
            doubts=self.drift.doubts,
            registry=self.registry,
            reuses_less=self.drift.reuses_less,
        )
        self.subscriber = Subscriber(
            index=dry_run or (self.setup.index if ladder is None else WatchedIndex(self.setup.index, ladder)),
            blocks=self.blocks,
            history=history,
            feeds=self.feeds,
            on_reconnected=self._ask_again,
            on_shortage=self.shortages,
        )
        self.loads = LoadFollower(self.registry, self.shortages)
        self._watcher: PodWatcher | None = None
        self._search: ModelSearch | None = None
        self._history = history
        self._config = config
        self._metrics = metrics
        self._dry_run = dry_run
        self._clock = clock
        if dry_run is not None:
            dry_run.redis_name = self.registry.name_in_redis
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.keys)
            await stack.enter_async_context(self.tls)
            self.session: aiohttp.ClientSession = await stack.enter_async_context(
                client_session(self.keys.for_url, self.tls.for_url)
            )
            await stack.enter_async_context(self.subscriber)
            await stack.enter_async_context(self.loads)
            await stack.enter_async_context(self._dry_run or self.setup)
            self._metrics.register(FeedCollector(self.feeds, self.drift.doubts, self.drift.reuse))
            self._metrics.register(PodCollector(self.registry, self.loads.stats))
            if self.setup.redis is not None:
                self._metrics.register(RedisCollector(self.setup.redis, self.setup.states))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def watching(
        self,
        *,
        on_gone: Callable[[str], None] = lambda _: None,
        on_models_changed: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[Watching]:
        """Watch every pod and follow its events while the context is open. Waits for their first answers for a while.

        `on_gone` is called with every endpoint that its pod no longer has, `on_models_changed` when a pod may serve
        other models than before.
        """
        follower = EventFollower(
            self.subscriber,
            self._config,
            on_gone=on_gone,
            on_followed=self.setup.follow,
            listens=self.setup.follows,
        )

        unserved = UnservedModels(self.registry, self._config.models)
        has_started = False

        def models_changed() -> None:
            on_models_changed()
            if has_started:
                unserved()

        def discovered(pod: Pod) -> None:
            follower(pod)
            self.loads.follow(pod)
            models_changed()

        watcher = PodWatcher(
            self.registry,
            self.session,
            self._config.pod_watch,
            on_discovered=discovered,
            on_measured=self._measured,
            on_restarted=self._restarted,
            on_asking=follower.asking,
            on_told=follower.answered,
            on_shortage=self.shortages,
        )
        self._watcher = watcher
        search = ModelSearch(self.registry, watcher.ask_models)
        async with watcher, search as self._search, LoopWatch(self._clock) as loop_watch:
            self._metrics.register(loop_watch)
            await watcher.first_round(FIRST_LOOK_SECONDS, others_seconds=OTHERS_SECONDS)
            for pod in self.registry.pods:
                if pod.facts is None:  # it may never answer, and then it is never discovered
                    follower(pod)
            has_started = True
            unserved()

            def renamed(models: Sequence[ModelConfig]) -> None:
                self.keys.reconfigure(models)
                unserved.reconfigure(models)

            yield Watching(self.registry, watcher, follower, self.loads, models_changed, discovered, renamed)

    async def find_model(self, name: str) -> bool:
        """Ask the pods for a model that none has reported. Returns whether one serves it now."""
        return self._search is not None and await self._search(lambda: self.registry.is_served(name))

    def _resync(self, name: str, *, replay: bool) -> None:
        self.subscriber.resync(name, replay=replay)

    def _reuses_less(self, name: str, is_less: bool) -> None:
        feed = self.feeds.get(name)
        if feed is not None:
            feed.ledger.reuses_less(is_less)

    def _ask_again(self, pod: str) -> None:
        """Its publisher was lost and is back: it may be another engine's."""
        if self._watcher is not None:
            self._watcher.ask_again(pod)

    def _restarted(self, pod: Pod) -> None:
        """Its metrics show another run of the engine, so that a replay that brings nothing means that it holds nothing."""
        for endpoint in pod.endpoints:
            feed = self.feeds.get(endpoint.name)
            if feed is not None and feed.engine_restarted():
                self._resync(endpoint.name, replay=True)

    def _measured(self, pod: Pod, metrics: EngineMetrics) -> None:
        """Forget what a sleeping engine held. Compare every rank's own counters with what was predicted for it."""
        if metrics.sleep in _EMPTY:
            self._forget_cache(pod)
        for endpoint in pod.endpoints:
            shown = metrics if endpoint.rank is None else metrics.ranks.get(endpoint.rank)
            if shown is not None and shown.prefix_hits is not None:
                counted = Lookups(shown.prefix_hits, shown.prefix_queries)
                self.drift.measured(endpoint.name, counted, began_at=metrics.read_at)

    def _forget_cache(self, pod: Pod) -> None:
        """The engine has given its KV cache away, which its events say only once it is awake and computes again."""
        for endpoint in pod.endpoints:
            feed = self.feeds.get(endpoint.name)
            if feed is not None and feed.state in SETTLED and len(feed.ledger):
                self._resync(endpoint.name, replay=False)
            if self._history is not None:
                self._history.forget(endpoint.name)


class Watching:
    """The pods being watched, which may join and leave."""

    def __init__(
        self,
        registry: PodRegistry,
        watcher: PodWatcher,
        follower: EventFollower,
        loads: LoadFollower,
        on_models_changed: Callable[[], None],
        discovered: Callable[[Pod], None],
        renamed: Callable[[Sequence[ModelConfig]], None],
    ) -> None:
        self.discovered = discovered
        """Call it with a pod that has reported something new about itself; the watcher does."""
        self._registry = registry
        self._watcher = watcher
        self._follower = follower
        self._loads = loads
        self._on_models_changed = on_models_changed
        self._renamed = renamed

    def reconfigure(self, watch: PodWatchConfig, models: Sequence[ModelConfig]) -> None:
        """Watch pods in this way from now on, and know models by these aliases."""
        self._registry.reconfigure(watch, models)
        self._watcher.reconfigure(watch)
        self._renamed(models)
        self._on_models_changed()

    def join(self, config: PodConfig) -> None:
        """Add a pod. Raises `ValueError` if there is one of that name."""
        pod = self._registry.join(bare_pod(config))
        if pod.kv_sources is not None:  # it may never report more
            self._follower(pod)
        self._watcher.watch(pod)

    def ask_again(self, name: str) -> None:
        """A pod may serve other adapters by now: ask it soon."""
        self._watcher.ask_again(name)

    def leave(self, name: str) -> None:
        """Remove a pod, and what is kept about it; its requests may finish. Does nothing if there is no such pod."""
        pod = self._registry.leave(name)
        if pod is not None:
            self._watcher.unwatch(name)
            self._follower.leave(pod)
            self._loads.leave(name)
            self._on_models_changed()
