"""The block index as configured: where look-ups go, where events are written to, and what is known of the caches.

kind     writer    look-ups      events are followed here, and written to
memory   agents    own memory    own memory
memory   gateway   own memory    own memory and Redis
redis    gateway   Redis         Redis
redis    agents    Redis         nothing: agents follow them
redis    none      Redis         nothing: others write, and tell nothing of what they know
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, cast

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import Config, SchedulerConfig
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.redis.index import RedisIndex, scheme_of
from matrixinfer.index.redis.pod_states import PodStates
from matrixinfer.index.redis.reclaim import Reclaimer
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.warm_start import fill
from matrixinfer.index.tee import TeeIndex
from matrixinfer.index.warm_start import WarmIndex
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.scheduler.plugins.kvcache_aware import KvCacheAware
from matrixinfer.scheduler.profile import arguments_of
from matrixinfer.tasks import cancel_and_wait
from matrixinfer.trust.cache_views import Caches, FeedCaches, ReportedCaches, SharedCaches, state_of
from matrixinfer.trust.drift import Drift

_UNKNOWN_YET = (FeedState.SYNCING, FeedState.STALE)


class Backend:
    """Use as an async context manager, once `attach` has been called; it owns the connection to Redis, if there is one.

    `models` gives the index's names of the models that are served.
    """

    def __init__(self, config: Config, blocks: TokenBlockProcessor, *, models: Callable[[], list[str]]) -> None:
        index = config.index
        self._max_age = index.max_age_seconds
        self.follows = index.kind == "memory" or index.writer == "gateway"
        """Whether this process follows the engines' events."""
        self.store = None if config.redis is None else Store(config.redis)
        self.redis: RedisIndex | None = None
        self.states: PodStates | None = None
        self.warm: WarmIndex | None = None
        self._reclaimer: Reclaimer | None = None
        self._unvouched = index.writer == "none"
        self._feeds: Mapping[str, PodFeed] = {}
        self._doubts: Callable[[str], bool] = lambda _: False
        if self.store is not None and (index.kind == "redis" or index.writer == "gateway"):
            self.redis = RedisIndex(
                self.store,
                blocks,
                max_age=index.max_age_seconds,
                lease_seconds=index.lease_seconds,
                state_of=self._state_of,
                is_known=self._is_known,
            )
            self._reclaimer = Reclaimer(
                self.store, max_age=index.max_age_seconds, keys_per_second=index.reclaim_keys_per_second
            )
        if self.store is not None and index.kind == "redis":
            self.states = PodStates(self.store, scheme_of(blocks), models=models)
        memory = MemoryIndex(max_blocks=index.max_blocks, prefix_closed=blocks.scheme == "prefix")
        if index.kind == "redis" and self.redis is not None:
            self.index: BlockIndex = self.redis
        elif self.redis is not None:
            self.index = TeeIndex(memory, self.redis)
        else:
            self.index = memory
        if index.kind == "memory" and index.warm_start:
            self.index = self.warm = WarmIndex(
                self.index, max_blocks=index.max_blocks, has_own_events=self._has_own_events
            )
        self.writes = self.redis is not None and index.writer == "gateway"
        """Whether this process writes to Redis."""
        self._stack = AsyncExitStack()

    def attach(self, feeds: Mapping[str, PodFeed], drift: Drift) -> Caches:
        """Have the writer tell of `feeds`; returns what is known of the caches, by feeds or by what other writers tell."""
        self._feeds, self._doubts = feeds, drift.doubts
        if self.states is not None and not self.follows:
            return ReportedCaches(self.states, unvouched=self._unvouched)
        warm = self.warm
        if self.states is not None and self.redis is not None:
            own, told = FeedCaches(feeds, drift.doubts), ReportedCaches(self.states)
            return SharedCaches(own, told, self._writes_surely)
        if warm is None:
            return FeedCaches(feeds, drift.doubts)
        return FeedCaches(feeds, lambda name: drift.doubts(name) or warm.is_warming(name))

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self.store is not None:
                await stack.enter_async_context(self.store)
            if self.redis is not None and self.writes:
                await stack.enter_async_context(self.redis)
                if self._reclaimer is not None:
                    await stack.enter_async_context(self._reclaimer)
            if self.states is not None:
                await stack.enter_async_context(self.states)
            if self.store is not None and self.warm is not None:
                task = asyncio.create_task(self._fill(self.warm, self.store), name="redis-warm-start")
                stack.push_async_callback(cancel_and_wait, task)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def follow(self) -> None:
        """Be the writer of every pod that is followed, also of those that hold nothing."""
        if self.redis is not None and self.writes:
            for name in self._feeds:
                self.redis.writer.follow(name)

    async def _fill(self, warm: WarmIndex, store: Store) -> None:
        await fill(warm, store, pods=self._feeds.keys, max_age=self._max_age)

    def _writes_surely(self, pod: str) -> bool:
        writer = None if self.redis is None else self.redis.writer
        return writer is not None and writer.is_writer(pod) and not writer.needs_resync(pod)

    def _has_own_events(self, pod: str) -> bool:
        """Whether the pod's own events say more by now than what is known from elsewhere."""
        feed = self._feeds.get(pod)
        if feed is None:
            return False
        return feed.state is FeedState.COMPLETE or feed.stats.restarts > 0 or feed.ledger.stats.clears > 0

    def _state_of(self, pod: str) -> str | None:
        return state_of(self._feeds.get(pod), doubted=self._doubts(pod))

    def _is_known(self, pod: str) -> bool:
        feed = self._feeds.get(pod.partition("~")[0])
        return feed is not None and feed.state not in _UNKNOWN_YET


def token_blocks(scheduler: SchedulerConfig) -> TokenBlockProcessor:
    """How prompts and caches are cut into blocks, as the arguments of `kvcache-aware` say. Raises `ConfigError`."""
    hashing = cast("KvCacheAware.Args", arguments_of(scheduler, KvCacheAware))
    return TokenBlockProcessor(hashing.block_size_to_hash, hashing.hash_scheme)
