"""How a service is started and stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from matrixinfer.cli.running import run_until_stopped
from matrixinfer.errors import ConfigError


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Service:
    """Takes some seconds to start and some to stop, and sends this process signals when it has begun to do so."""

    def __init__(self, *, start: float = 0.0, stop: float = 0.0, at_start: int = 0, at_stop: int = 0) -> None:
        self._seconds = (start, stop)
        self._signals = (at_start, at_stop)
        self.did: list[str] = []

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        (start, stop), (at_start, at_stop) = self._seconds, self._signals
        self.did.append("starting")
        try:
            for _ in range(at_start):
                os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(start)
            self.did.append("started")
            yield
            for _ in range(at_stop):
                os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(stop)
            self.did.append("drained")
        finally:
            self.did.append("stopped")


def kill_with(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


async def test_a_service_runs_until_a_signal_and_ends_well() -> None:
    service = Service(stop=0.05)
    await run_until_stopped(service.run(), path="here", on_started=kill_with(signal.SIGTERM))
    assert service.did == ["starting", "started", "drained", "stopped"]


async def test_a_second_signal_cuts_the_end_short() -> None:
    service = Service(stop=60.0, at_stop=1)
    await run_until_stopped(service.run(), path="here", on_started=kill_with(signal.SIGTERM))
    assert service.did == ["starting", "started", "stopped"]


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, ["terminated"]), (signal.SIGINT, [])])
async def test_only_a_termination_may_have_a_balancer_in_front(number: signal.Signals, told: list[str]) -> None:
    seen: list[str] = []
    await run_until_stopped(
        Service().run(), path="here", on_started=kill_with(number), on_terminated=lambda: seen.append("terminated")
    )
    assert seen == told


async def test_a_hang_up_is_passed_on_and_ends_nothing() -> None:
    service = Service()
    hung_up: list[str] = []

    async def hang_up_and_stop() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    async with asyncio.TaskGroup() as group:
        started = lambda: group.create_task(hang_up_and_stop())  # noqa: E731
        await run_until_stopped(
            service.run(), path="here", on_started=started, on_hangup=lambda: hung_up.append("hung up")
        )
    assert hung_up == ["hung up"]
    assert service.did == ["starting", "started", "drained", "stopped"]


@pytest.mark.parametrize("signals", [1, 2])
async def test_a_signal_during_the_start_ends_it(signals: int) -> None:
    service = Service(start=60.0, at_start=signals)
    async with asyncio.timeout(5):
        await run_until_stopped(service.run(), path="here")
    assert service.did == ["starting", "stopped"]


async def test_a_cancellation_without_a_signal_stays_one() -> None:
    service = Service()
    task = asyncio.create_task(run_until_stopped(service.run(), path="here"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert service.did == ["starting", "started", "stopped"]


async def test_an_address_that_is_taken_is_an_error_of_the_configuration() -> None:
    @asynccontextmanager
    async def taken() -> AsyncIterator[None]:
        raise OSError("address already in use")
        yield

    with pytest.raises(ConfigError, match="here: cannot listen: address already in use"):
        await run_until_stopped(taken(), path="here")
