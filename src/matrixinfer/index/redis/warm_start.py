"""Fills an embedded index with the blocks in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping

import structlog

from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import scan
from matrixinfer.index.redis.store import Store
from matrixinfer.index.warm_start import WarmIndex

DEADLINE_SECONDS = 60.0
PROGRESS_SECONDS = 5.0

log = structlog.get_logger(__name__)


async def fill(
    index: WarmIndex,
    store: Store,
    *,
    pods: Callable[[], Collection[str]],
    max_age: float,
    clock: Callable[[], float] = time.time,
    own_names: Callable[[], Mapping[str, str]] = dict,
) -> int:
    """Copy all entries that count of `pods` and of their reusable ends, within `DEADLINE_SECONDS`. Returns their number; the copy may be incomplete.

    `own_names` returns the index's names of models by those in Redis, where they differ.
    """
    copied, logged_at = 0, time.monotonic()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            floors = await scan.floors(store, max_age=max_age, clock=clock)
            async for page in scan.pages(store):
                wanted, names = pods(), own_names()
                for block in page:
                    for pod, at in block.stamps.items():
                        if floors.counts(pod, at) and pod.removesuffix(ENDS_SUFFIX) in wanted:
                            index.warm(names.get(block.model, block.model), pod, (block.hash,))
                            copied += 1
                if time.monotonic() > logged_at + PROGRESS_SECONDS:
                    logged_at = time.monotonic()
                    log.info("redis_warm_start_progressed", entries=copied)
                await asyncio.sleep(0)
    except (IndexUnavailable, TimeoutError) as error:
        log.warning("redis_warm_start_interrupted", entries=copied, error=str(error) or "deadline exceeded")
    else:
        log.info("redis_warm_start_finished", entries=copied)
    return copied
