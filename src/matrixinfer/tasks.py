"""The end of a task that its owner no longer needs."""

from __future__ import annotations

import asyncio

_AGAIN_SECONDS = 1.0


async def cancel_and_wait(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait until it is over; its error, if it had one, is raised.

    It is cancelled again when that was lost on the way, as in libraries that take a cancellation for a time-out.
    """
    if task is None:
        return
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN_SECONDS)
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
