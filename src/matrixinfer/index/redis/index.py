"""`RedisIndex`: a block index in Redis or Valkey."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.base import IndexStats
from matrixinfer.index.redis.reader import BlockReader
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.writer import LEASE_SECONDS, BlockWriter

VERSION = "1"
"""Of the layout."""
_COUNTED_EXACTLY = 50_000
_ENTRY_BYTES = 110
"""Of one block of one pod in this process, estimated."""


class RedisIndex:
    """A `BlockIndex` whose blocks are in Redis, for whoever reads and writes them there.

    Use as an async context manager. What is added here is written by this process, as long as it is the pod's writer;
    what is matched may have been written by anyone.
    """

    def __init__(
        self,
        store: Store,
        blocks: TokenBlockProcessor,
        *,
        max_age: float,
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.time,
        name: str | None = None,
    ) -> None:
        self.reader = BlockReader(store, max_age=max_age, clock=clock)
        self.writer = BlockWriter(store, meta=scheme_of(blocks), max_age=max_age, lease=lease, clock=clock, name=name)
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
        """Never: writers of other projects leave holes, and entries age one by one."""
        return False

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """`pod` now holds `hashes`; `parent` does not matter."""
        self.writer.add(model, pod, hashes)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """`pod` no longer holds `hashes`."""
        self.writer.remove(model, pod, list(hashes))

    def clear(self, pod: str) -> None:
        """`pod` holds nothing any more, of any model."""
        self.writer.clear(pod)

    def forget(self, pod: str) -> None:
        """`pod` is gone."""
        self.writer.forget(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        """How many blocks each pod holds consecutively from the start. Raises `IndexUnavailable`."""
        return await self.reader.match(model, hashes)

    async def flush(self) -> None:
        """Wait until every write so far is visible. Raises `IndexUnavailable` when that takes too long."""
        await self.writer.flush()

    def stats(self) -> IndexStats:
        """Counts of what this process writes. Where that is much, a block counts once for each pod."""
        # One set of all blocks would hold up the loop where there are many.
        boxes = [box for pod in self.writer.pods if (box := self.writer.held(pod)) is not None and len(box)]
        models = {model for box in boxes for model in box.models}
        entries = sum(map(len, boxes))
        blocks = entries
        if len(boxes) > 1 and entries <= _COUNTED_EXACTLY:
            blocks = sum(len(set().union(*(box.blocks_of(model) for box in boxes))) for model in models)
        return IndexStats(blocks=blocks, pods=len(boxes), evicted=0, memory_bytes=entries * _ENTRY_BYTES)


def scheme_of(blocks: TokenBlockProcessor) -> dict[str, str]:
    """What `matrix:kv:meta:{model}` tells of a model's blocks."""
    return {"block_size": str(blocks.block_size), "hash_scheme": blocks.scheme, "version": VERSION}
