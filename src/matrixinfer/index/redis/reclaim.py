"""Deletes entries that no longer count, of pods that were cleared or have gone. Works slowly in the background."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import structlog

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout, scan, scripts
from matrixinfer.index.redis.store import Script, Store
from matrixinfer.tasks import cancel_and_wait

LOCK = "{matrix:kv}:reclaimer"
LOCK_SECONDS = 60
"""Lifetime of the lock, which lets only one process at a time scan the keys."""
PAUSE_SECONDS = 60.0
"""Pause between two passes."""

log = structlog.get_logger(__name__)


class Reclaimer:
    """Scans all keys in the background. Use as an async context manager; it owns one task.

    `max_age` is in seconds; `clock` returns Unix seconds. With `keys_per_second` 0 it does nothing.
    """

    def __init__(
        self,
        store: Store,
        *,
        max_age: float,
        keys_per_second: float,
        name: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.reclaimed = 0
        """Number of entries deleted since the start."""
        self._store = store
        self._max_age = max_age
        self._keys_per_second = keys_per_second
        self._name = name or f"{id(self):x}"
        self._clock = clock
        self._script = Script(scripts.RECLAIM)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._keys_per_second > 0:
            self._task = asyncio.create_task(self._run(), name="redis-reclaimer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_and_wait(self._task)

    async def once(self) -> int:
        """Scan all keys once. Returns the number of deleted entries. Raises `IndexUnavailable`."""
        total = 0
        await self._drop_rows()
        async for page in scan.pages(self._store, keys_per_second=self._keys_per_second):
            floors = await scan.floors(self._store, max_age=self._max_age, clock=self._clock)
            for block in page:
                if not all(floors.counts(pod, at) for pod, at in block.stamps.items()):
                    deleted = await self._reclaim(block, floors)
                    total += deleted
                    self.reclaimed += deleted
            if not await self.take_lock():
                raise IndexUnavailable("another process has started to scan the keys")
        return total

    async def _drop_rows(self) -> None:
        """Delete the rows of pods without a living writer whose entries are all too old to count."""
        client: Any = self._store.client
        leases, epochs, stamps = [await self._store.table(key) for key in (layout.LEASES, layout.EPOCHS, layout.STAMPS)]
        oldest = self._clock() - self._max_age
        tables: dict[bytes, int] = dict.fromkeys({*epochs, *stamps, *leases}, 0)
        for table in (leases, epochs, stamps):
            for pod, text in table.items():
                tables[pod] = max(tables[pod], layout.number(text) or 0)
        old = [pod for pod, last in tables.items() if last < oldest]
        if old:
            for key in (layout.STATES, layout.LEASES, layout.WRITERS, layout.TOKENS, layout.STAMPS, layout.EPOCHS):
                await self._store.ask(client.hdel(key, *old))

    async def _reclaim(self, block: scan.Block, floors: layout.Floors) -> int:
        """Compare and delete in one atomic step, because an entry may have been restamped since it was read."""
        args: list[str | int] = [floors.default, layout.SUFFIX]
        for pod in block.stamps.keys() & floors.by_pod.keys():
            args += (pod, floors.by_pod[pod])
        return int(await self._store.run(self._script, (block.key,), args))

    async def _run(self) -> None:
        while True:
            try:
                if await self.take_lock():
                    deleted = await self.once()
                    if deleted:
                        log.info("redis_entries_reclaimed", entries=deleted)
            except IndexUnavailable as error:
                log.info("redis_reclaim_interrupted", error=str(error))
            except Exception:
                # Supervision boundary: unexpected data in Redis must not end the task.
                log.exception("redis_reclaim_failed")
            await asyncio.sleep(PAUSE_SECONDS)

    async def take_lock(self) -> bool:
        """Take or extend the lock. It is lost if one page took longer than `LOCK_SECONDS`."""
        client: Any = self._store.client
        if await self._store.ask(client.set(LOCK, self._name, nx=True, ex=LOCK_SECONDS)):
            return True
        if await self._store.ask(client.get(LOCK)) != self._name.encode():
            return False
        return bool(await self._store.ask(client.expire(LOCK, LOCK_SECONDS)))
