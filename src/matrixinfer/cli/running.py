"""Runs a service until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from matrixinfer.errors import ConfigError


async def run_until_stopped(
    service: AbstractAsyncContextManager[object], *, path: str, on_started: Callable[[], object] = lambda: None
) -> None:
    """Keep `service` open until SIGTERM or SIGINT comes. A signal that comes while it starts ends the start.

    Raises `ConfigError` at `path` when it cannot listen.
    """
    stop = asyncio.Event()
    loop, task, is_started = asyncio.get_running_loop(), asyncio.current_task(), False

    def stopped() -> None:
        if task is not None and not (is_started or stop.is_set()):
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped)
    try:
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(service)
            except OSError as error:
                raise ConfigError(path, f"cannot listen: {error}") from error
            is_started = True
            on_started()
            await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set() or task is None:
            raise
        task.uncancel()
