"""`RedisIndex`: a block index in Redis or Valkey."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.index.base import IndexStats
from matrixinfer.index.redis.match_watch import MatchWatch
from matrixinfer.index.redis.reader import BlockReader
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.writer import LEASE_SECONDS, BlockWriter

VERSION = "1"
"""Version of the layout."""
_COUNTED_EXACTLY = 50_000
"""Up to this many entries, `stats` counts distinct blocks."""
_ENTRY_BYTES = 110
"""Estimated memory of one entry, a block of a pod, in this process."""


class RedisIndex:
    """A `BlockIndex` whose blocks are in Redis, where other processes read and write them too.

    Use as an async context manager. This process writes the blocks of a pod as long as it is the pod's writer; matches
    include the blocks of all writers. `max_age` and `lease_seconds` are in seconds, and `clock` returns Unix seconds.
    `state_of` and `is_known` are those of `BlockWriter`, `starts` and `endpoints` those of `BlockReader`. `redis_name`
    returns a model's name in Redis. `watch` sees every lookup; its context is the caller's.
    """

    def __init__(
        self,
        store: Store,
        blocks: TokenBlockProcessor,
        *,
        max_age: float,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.time,
        name: str | None = None,
        state_of: Callable[[str], str | None] | None = None,
        is_known: Callable[[str], bool] | None = None,
        starts: Callable[[], Mapping[str, float]] = dict,
        endpoints: Callable[[], Collection[str]] | None = None,
        redis_name: Callable[[str], str] = str,
        watch: MatchWatch | None = None,
    ) -> None:
        self.watch = watch
        self._redis_name = redis_name
        self._prefix_closed = blocks.scheme == "prefix"
        self.reader = BlockReader(
            store,
            max_age=max_age,
            prefix_closed=self._prefix_closed,
            clock=clock,
            starts=starts,
            endpoints=endpoints,
        )
        self.writer = BlockWriter(
            store,
            meta=scheme_of(blocks),
            max_age=max_age,
            lease_seconds=lease_seconds,
            clock=clock,
            name=name,
            state_of=state_of,
            is_known=is_known,
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.writer)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def prefix_closed(self) -> bool:
        """Whether what is written here is so. Other writers may leave holes: lookups rely on it for living writers of ours alone."""
        return self._prefix_closed

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """Record that `pod` holds `hashes`. `parent` is ignored."""
        self.writer.add(self._redis_name(model), pod, hashes)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """Record that `pod` no longer holds `hashes`."""
        self.writer.remove(self._redis_name(model), pod, list(hashes))

    def clear(self, pod: str) -> None:
        """Remove all blocks of `pod`, for every model."""
        self.writer.clear(pod)

    def forget(self, pod: str) -> None:
        """Remove all data of `pod`, which has gone."""
        self.writer.forget(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        """How many blocks each pod holds, consecutively from the start. Raises `IndexUnavailable`."""
        name = self._redis_name(model)
        found = await self.reader.match(name, hashes)
        if self.watch is not None:
            self.watch.observe(name, hashes, found)
        return found

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> Mapping[str, int]:
        """The position in `hashes` of the last block that each of `pods` holds. Raises `IndexUnavailable`."""
        return await self.reader.last(self._redis_name(model), pods, hashes)

    async def flush(self) -> None:
        """Wait until all writes so far are visible. Raises `IndexUnavailable` if that takes too long."""
        await self.writer.flush()

    def stats(self) -> IndexStats:
        """Counters of what this process writes. If that is a lot, a block counts once per pod."""
        # With many entries, building a set of all blocks would block the event loop.
        by_pod = {pod: outbox for pod in self.writer.pods if (outbox := self.writer.held(pod)) is not None}
        outboxes = [outbox for pod, outbox in by_pod.items() if len(outbox) and not pod.endswith(ENDS_SUFFIX)]
        models = {model for outbox in outboxes for model in outbox.models}
        entries = sum(map(len, outboxes))
        blocks = entries
        if len(outboxes) > 1 and entries <= _COUNTED_EXACTLY:
            blocks = sum(len(set().union(*(outbox.blocks_of(model) for outbox in outboxes))) for model in models)
        memory = sum(map(len, by_pod.values())) * _ENTRY_BYTES
        return IndexStats(blocks=blocks, pods=len(outboxes), evicted=0, memory_bytes=memory)


def scheme_of(blocks: TokenBlockProcessor) -> dict[str, str]:
    """The fields of `matrix:kv:meta:{model}`: how a model's blocks are hashed."""
    return {"block_size": str(blocks.block_size), "hash_scheme": blocks.scheme, "version": VERSION}
