"""Ends tasks that their owner no longer needs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_RETRY_SECONDS = 1.0


async def cancel_and_wait(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait until it ends. If it ended with an exception, raise that.

    The task is cancelled again every second, because some libraries swallow a cancellation as if it were a timeout.
    """
    if task is None:
        return
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_RETRY_SECONDS)
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks as `cancel_and_wait` does, all at the same time. How they end does not matter."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_RETRY_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()  # so that nobody is told that it was lost
