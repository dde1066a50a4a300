"""The block index as configured: where lookups go, where events are written, and what is known about the caches.

kind     writer    lookups       this process follows events, and writes them to
memory   agents    own memory    own memory
memory   gateway   own memory    own memory and Redis
redis    gateway   Redis         Redis
redis    agents    Redis         (nowhere: agents follow and write)
redis    none      Redis         (nowhere: others write, and report nothing about their feeds)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Self

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import BlocksConfig, Config, IndexConfig
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.redis.index import RedisIndex, scheme_of
from matrixinfer.index.redis.match_watch import MatchWatch
from matrixinfer.index.redis.pod_states import PodStates
from matrixinfer.index.redis.reclaim import Reclaimer
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.warm_start import fill
from matrixinfer.index.tee import TeeIndex
from matrixinfer.index.warm_start import WarmIndex
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.tiers import index_names
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.tasks import cancel_and_wait
from matrixinfer.trust.cache_views import Caches, FeedCaches
from matrixinfer.trust.shared_caches import ReportedCaches, SharedCaches, state_of

_MOST_NAMES = 4_096
STARTS_SECONDS = 0.5
"""How old the engines' start times may be that a lookup uses."""
_UNKNOWN_YET = (FeedState.SYNCING, FeedState.STALE)


class IndexSetup:
    """The index and everything behind it. Use it as an async context manager.

    It owns the connection to Redis, if one is configured. `feeds` are the feeds that this process follows, by endpoint;
    `doubts` says whether an endpoint has drifted, `reuses_less` whether answers have shown that it reuses less than its
    events say.
    """

    def __init__(
        self,
        config: Config,
        blocks: TokenBlockProcessor,
        *,
        feeds: Mapping[str, PodFeed],
        doubts: Callable[[str], bool],
        registry: PodRegistry,
        reuses_less: Callable[[str], bool] = lambda _: False,
    ) -> None:
        index = config.index
        self._feeds = feeds
        self._doubts = doubts
        self._reuses_less = reuses_less
        self._config = index
        self._registry = registry
        self._starts_known: Mapping[str, float] = {}
        self._starts_until = float("-inf")
        self.follows = index.kind == "memory" or index.writer == "gateway"
        """Whether this process follows the engines' events."""
        self.store = None if config.redis is None else Store(config.redis)
        self.redis: RedisIndex | None = None
        self.states: PodStates | None = None
        self.warm: WarmIndex | None = None
        if self.store is not None and (index.kind == "redis" or index.writer == "gateway"):
            self.redis = self._redis_index(self.store, index, blocks)
        if self.store is not None and index.kind == "redis":
            self.states = PodStates(
                self.store, scheme_of(blocks), models=registry.base_models, redis_name=registry.name_in_redis
            )
        self.writes = self.redis is not None and index.writer == "gateway"
        """Whether this process writes to Redis."""
        self.index = self._index(index, blocks)
        if index.kind == "memory" and index.warm_start:
            self.index = self.warm = WarmIndex(
                self.index, max_blocks=index.max_blocks, has_own_events=self._has_own_events
            )
        self.caches = self._caches(unvouched=index.writer == "none")
        """What is known about every endpoint's cache: from feeds, or from what other writers report."""
        self._stack = AsyncExitStack()
        self._names: dict[str, tuple[str, ...]] = {}  # the index's names of each endpoint

    def _redis_index(self, store: Store, index: IndexConfig, blocks: TokenBlockProcessor) -> RedisIndex:
        return RedisIndex(
            store,
            blocks,
            max_age=index.max_age_seconds,
            lease_seconds=index.lease_seconds,
            state_of=self._state_of,
            is_known=self._is_known,
            starts=self._starts,
            endpoints=self._registry.endpoint_names,
            redis_name=self._registry.name_in_redis,
            watch=self._match_watch(store, blocks) if index.writer == "none" else None,
        )

    def _match_watch(self, store: Store, blocks: TokenBlockProcessor) -> MatchWatch:
        registry = self._registry
        return MatchWatch(
            store, blocks, knows=registry.knows, endpoints=registry.endpoint_names, sizes=registry.block_sizes
        )

    @property
    def unmatched(self) -> Callable[[], Awaitable[Sequence[Mapping[str, object]]]] | None:
        """Asks Redis why lookups of some models never match; None where this project's own writers say how they hash."""
        watch = None if self.redis is None else self.redis.watch
        if watch is None:
            return None

        async def search() -> Sequence[Mapping[str, object]]:
            return [asdict(problem) for problem in await watch.search()]

        return search

    def missing(self) -> str | None:
        """What an agent needs and does not have: the server that it writes to."""
        if self.redis is None or not self.redis.writer.pods or self.redis.writer.is_connected:
            return None
        return "Redis does not accept writes"

    def _starts(self) -> Mapping[str, float]:
        """When the engines started that no living writer vouches for, as read within the last second."""
        states, now = self.states, time.monotonic()
        if states is None:
            return {}
        if now >= self._starts_until:
            self._starts_known = {name: at for name, at in self._registry.starts().items() if not states.is_alive(name)}
            self._starts_until = now + STARTS_SECONDS
        return self._starts_known

    def _index(self, index: IndexConfig, blocks: TokenBlockProcessor) -> BlockIndex:
        """The index without a warm start around it."""
        if index.kind == "redis" and self.redis is not None:
            return self.redis
        memory = MemoryIndex(max_blocks=index.max_blocks, prefix_closed=blocks.scheme == "prefix")
        return memory if self.redis is None else TeeIndex(memory, self.redis)

    def _caches(self, *, unvouched: bool) -> Caches:
        states, warm, doubts = self.states, self.warm, self._doubts
        if states is not None and not self.follows:
            return ReportedCaches(states, unvouched=unvouched, reuses_less=self._reuses_less)
        if states is not None and self.redis is not None:
            return SharedCaches(FeedCaches(self._feeds, doubts), ReportedCaches(states), self._writes_surely)
        if warm is None:
            return FeedCaches(self._feeds, doubts)
        return FeedCaches(self._feeds, lambda name: doubts(name) or warm.is_warming(name), warm.is_warming)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self.store is not None:
                await stack.enter_async_context(self.store)
            if self.store is not None and self.redis is not None and self.writes:
                await stack.enter_async_context(self.redis)
                await stack.enter_async_context(self._reclaimer(self.store))
            if self.states is not None:
                await stack.enter_async_context(self.states)
            if self.redis is not None and self.redis.watch is not None:
                await stack.enter_async_context(self.redis.watch)
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

    def _reclaimer(self, store: Store) -> Reclaimer:
        index = self._config
        return Reclaimer(store, max_age=index.max_age_seconds, keys_per_second=index.reclaim_keys_per_second)

    async def _fill(self, warm: WarmIndex, store: Store) -> None:
        await fill(warm, store, pods=self._feeds.keys, max_age=self._config.max_age_seconds, own_names=self._own_names)

    def _own_names(self) -> Mapping[str, str]:
        """The index's names of the served models by those in Redis."""
        return {self._registry.name_in_redis(model): model for model in self._registry.base_models()}

    def _writes_surely(self, pod: str) -> bool:
        if self.redis is None:
            return False
        names = self._names.get(pod)
        if names is None:
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            names = self._names[pod] = tuple(index_names(pod))
        return self.redis.writer.is_sure(pod, names)

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
