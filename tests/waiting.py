"""Waiting until something holds. A busy machine may take long, so a deadline only ends what would never end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

DEADLINE_SECONDS = 60.0


async def eventually(condition: Callable[[], bool | Awaitable[bool]], *, pause: float = 0.01) -> None:
    """Look at `condition` again and again until it holds. Raises `TimeoutError` at the deadline."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await _holds(condition()):
            await asyncio.sleep(pause)


async def _holds(answer: bool | Awaitable[bool]) -> bool:
    return answer if isinstance(answer, bool) else await answer


def wait_until(condition: Callable[[], bool], *, pause: float = 0.05) -> None:
    """The same for code without an event loop."""
    ends = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError
        time.sleep(pause)
