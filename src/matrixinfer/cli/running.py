"""Runs a service until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import uvloop

from matrixinfer.app.systemd import Notifier
from matrixinfer.errors import ConfigError
from matrixinfer.tasks import cancel_and_wait

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_to_the_end(main: Coroutine[object, object, None]) -> None:
    """Run `main` in an event loop. Signals that come when it has ended no longer count: the process ends anyway.

    The loop gives them back their default, which kills, while it closes.
    """

    async def whole() -> None:
        try:
            await main
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    try:
        uvloop.run(whole())
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


async def run_until_stopped(
    service: AbstractAsyncContextManager[object],
    *,
    path: str,
    on_started: Callable[[], object] = lambda: None,
    on_terminated: Callable[[], object] = lambda: None,
    on_hangup: Callable[[], object] = lambda: None,
    notifier: Notifier | None = None,
) -> None:
    """Keep `service` open until SIGTERM or SIGINT comes. A signal that comes while it starts ends the start.

    `on_terminated` is called before the service ends if the signal is SIGTERM: nobody waits at a terminal. A second
    signal cancels what the service does to end well. SIGHUP calls `on_hangup`. `notifier` reports the
    start, the end, and that the event loop runs. Raises `ConfigError` at `path` when the service cannot listen.
    """
    notifier = Notifier({}, 0) if notifier is None else notifier
    stop = asyncio.Event()
    loop, task, is_started = asyncio.get_running_loop(), asyncio.current_task(), False

    def stopped(number: signal.Signals) -> None:
        if task is not None and (stop.is_set() or not is_started):
            task.cancel()
        else:
            notifier.stopping()
            if number is signal.SIGTERM:
                on_terminated()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped, number)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        async with AsyncExitStack() as stack:
            watchdog = asyncio.create_task(notifier.watch(), name="watchdog")
            stack.push_async_callback(cancel_and_wait, watchdog)  # last of all: the drain counts as life
            try:
                await stack.enter_async_context(service)
            except OSError as error:
                raise ConfigError(path, f"cannot listen: {error}") from error
            is_started = True
            on_started()
            notifier.ready()
            await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set() or task is None:
            raise
        task.uncancel()
