"""Deletes what counts no more: of pods that were cleared or are gone. In the background, a few keys at a time."""

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
"""One process at a time looks through the keys."""
PAUSE_SECONDS = 60.0
"""From the end of one pass to the next."""

log = structlog.get_logger(__name__)


class Reclaimer:
    """Use as an async context manager; it owns one task. `clock` is Unix time in seconds."""

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
        """Entries deleted since the start."""
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
        """Look through all keys; returns how many entries were deleted. Raises `IndexUnavailable`."""
        gone = 0
        await self._drop_rows()
        async for page in scan.pages(self._store, keys_per_second=self._keys_per_second):
            floors = await scan.floors(self._store, max_age=self._max_age, clock=self._clock)
            default = int(self._clock() - self._max_age)
            for block in page:
                if any(at < floors.get(pod, default) for pod, at in block.stamps.items()):
                    deleted = await self._reclaim(block, floors, default)
                    gone += deleted
                    self.reclaimed += deleted
            if not await self._is_alone():
                raise IndexUnavailable("another process has begun to look through the keys")
        return gone

    async def _drop_rows(self) -> None:
        """What is kept of pods that nobody writes any more, and whose entries are all too old to count, goes too."""
        client: Any = self._store.client
        leases = await self._store.ask(client.hgetall(layout.LEASES))
        epochs = await self._store.ask(client.hgetall(layout.EPOCHS))
        stamps = await self._store.ask(client.hgetall(layout.STAMPS))
        oldest = self._clock() - self._max_age
        tables: dict[bytes, int] = dict.fromkeys({*epochs, *stamps, *leases}, 0)
        for table in (leases, epochs, stamps):
            for pod, text in table.items():
                tables[pod] = max(tables[pod], layout.number(text) or 0)
        old = [pod for pod, last in tables.items() if last < oldest]
        if old:
            for table in (layout.STATES, layout.LEASES, layout.WRITERS, layout.TOKENS, layout.STAMPS, layout.EPOCHS):
                await self._store.ask(client.hdel(table, *old))

    async def _reclaim(self, block: scan.Block, floors: dict[str, int], default: int) -> int:
        """Compare and delete in one step: an entry may have been stamped anew since it was looked at."""
        args: list[str | int] = [default, layout.SUFFIX]
        for pod in block.stamps.keys() & floors.keys():
            args += (pod, floors[pod])
        return int(await self._store.run(self._script, (block.key,), args))

    async def _run(self) -> None:
        while True:
            try:
                if await self._is_alone():
                    gone = await self.once()
                    if gone:
                        log.info("redis_reclaimed", entries=gone)
            except IndexUnavailable as error:
                log.info("redis_reclaim_broke_off", error=str(error))
            except Exception:
                # Supervision boundary: whatever lies in Redis, the next pass comes.
                log.exception("redis_reclaim_failed")
            await asyncio.sleep(PAUSE_SECONDS)

    async def _is_alone(self) -> bool:
        """Take the lock, or keep it: it is lost where one page took longer than `LOCK_SECONDS`."""
        client: Any = self._store.client
        if await self._store.ask(client.set(LOCK, self._name, nx=True, ex=LOCK_SECONDS)):
            return True
        if await self._store.ask(client.get(LOCK)) != self._name.encode():
            return False
        return bool(await self._store.ask(client.expire(LOCK, LOCK_SECONDS)))
