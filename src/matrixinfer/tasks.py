"""Ends a task that its owner no longer needs."""

from __future__ import annotations

import asyncio

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
