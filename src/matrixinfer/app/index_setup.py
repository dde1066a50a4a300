"""The block index as configured: where lookups go, where events are written, and what is known of the caches.

kind     writer    lookups       this process follows events, and writes them to
memory   agents    own memory    own memory
memory   gateway   own memory    own memory and Redis
redis    gateway   Redis         Redis
redis    agents    Redis         (nowhere: agents follow and write)
redis    none      Redis         (nowhere: others write, and report nothing about their feeds)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import BlocksConfig, Config
from matrixinfer.config.endpoint_names import EndpointName
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
from matrixinfer.tasks import cancel_and_wait
from matrixinfer.trust.cache_views import Caches, FeedCaches, ReportedCaches, SharedCaches, state_of
from matrixinfer.trust.drift import Drift

_UNKNOWN_YET = (FeedState.SYNCING, FeedState.STALE)


class IndexSetup:
    """The index and everything behind it. `attach` it to the feeds first, then use it as an async context manager.

    It owns the connection to Redis, if one is configured. `models` returns the index's names of the served models.
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
        """Have the writer report on `feeds`. Returns what is known of the caches, from feeds or from other writers' reports."""
        self._feeds, self._doubts = feeds, drift.doubts
        if self.states is not None and not self.follows:
            return ReportedCaches(self.states, unvouched=self._unvouched)
        warm = self.warm
        if self.states is not None and self.redis is not None:
            return SharedCaches(FeedCaches(feeds, drift.doubts), ReportedCaches(self.states), self._writes_surely)
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
        """Be the writer of every followed publisher, including those that hold nothing yet."""
        if self.redis is not None and self.writes:
            for name in self._feeds:
                self.redis.writer.follow(name)

    async def _fill(self, warm: WarmIndex, store: Store) -> None:
        await fill(warm, store, pods=self._feeds.keys, max_age=self._max_age)

    def _writes_surely(self, pod: str) -> bool:
        writer = None if self.redis is None else self.redis.writer
        return writer is not None and writer.is_writer(pod) and not writer.needs_resync(pod)

    def _has_own_events(self, pod: str) -> bool:
        """Whether the publisher's own events say more by now than a warm start does."""
        feed = self._feeds.get(pod)
        if feed is None:
            return False
        return feed.state is FeedState.COMPLETE or feed.stats.restarts > 0 or feed.ledger.stats.clears > 0

    def _state_of(self, pod: str) -> str | None:
        return state_of(self._feeds.get(pod), doubted=self._doubts(pod))

    def _is_known(self, pod: str) -> bool:
        feed = self._feeds.get(EndpointName.parse(pod).endpoint)
        return feed is not None and feed.state not in _UNKNOWN_YET


def token_blocks(blocks: BlocksConfig) -> TokenBlockProcessor:
    """How prompts and caches are cut into blocks."""
    return TokenBlockProcessor(blocks.size, blocks.scheme)
