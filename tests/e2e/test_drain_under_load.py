"""A gateway that is told to end while clients keep coming: it answers what it has accepted, and ends in time."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from matrixinfer.config import DrainConfig
from tests.soak.fleet import MODEL, fleet
from tests.waiting import DEADLINE_SECONDS

from .fault_world import World, fault_world

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
DELAY_SECONDS = 1.0
DEFAULT_DELAY_SECONDS = DrainConfig().delay_seconds
CLIENTS = 24


async def send(world: World, session: aiohttp.ClientSession, *, stream: bool) -> str:
    """One request; how it ended."""
    body = {"model": "m", "prompt": "x", "stream": stream}
    try:
        async with session.post(f"{world.gateway}/v1/completions", json=body) as response:
            answer = await response.read()
    except aiohttp.ClientConnectorError:
        return "refused"
    except aiohttp.ClientError as error:
        return type(error).__name__
    whole = answer.endswith(b"data: [DONE]\n\n" if stream else b"}")
    return "answered" if response.status == 200 and whole else f"{response.status}: {answer[-40:]!r}"


async def ends_under_load(
    world: World, *, keeps: bool, goes_on: Callable[[aiohttp.ClientSession], Awaitable[bool]]
) -> Counter[str]:
    """How requests end that are sent before and after SIGTERM, until `goes_on` says no or they are refused."""
    ended: Counter[str] = Counter()
    connector = aiohttp.TCPConnector(limit=0, force_close=not keeps)

    async def client(number: int) -> None:
        while await goes_on(session):
            outcome = await send(world, session, stream=number % 2 == 0)
            ended[outcome] += 1
            if outcome == "refused":
                return

    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(number))
        await asyncio.sleep(1.0)
        told = time.monotonic()
        world.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(world.process.wait, DEADLINE_SECONDS)
        assert code == 0
        assert time.monotonic() - told < DELAY_SECONDS + 5.0
    return ended


@pytest.mark.parametrize("keeps", [True, False], ids=["kept connections", "new connections"])
async def test_behind_a_balancer_that_asks_whether_it_is_ready_no_request_fails(tmp_path: Path, keeps: bool) -> None:
    async with fault_world(tmp_path, engines=2, delay=DELAY_SECONDS) as world:

        async def is_ready(session: aiohttp.ClientSession) -> bool:
            async with session.get(f"{world.gateway}/ready") as response:
                return response.status == 200

        ended = await ends_under_load(world, keeps=keeps, goes_on=is_ready)
    assert set(ended) == {"answered"}
    assert ended["answered"] > CLIENTS


async def test_clients_that_nobody_warns_are_answered_or_refused(tmp_path: Path) -> None:
    async with fault_world(tmp_path, engines=2, delay=0.0) as world:

        async def always(_: aiohttp.ClientSession) -> bool:
            return True

        ended = await ends_under_load(world, keeps=False, goes_on=always)
    assert set(ended) == {"answered", "refused"}
    assert ended["refused"] == CLIENTS


@pytest.mark.parametrize("lost", ["freeze", "kill"])
async def test_a_gateway_that_writes_to_a_lost_redis_ends_in_time(tmp_path: Path, lost: str) -> None:
    async with fleet(tmp_path, redis=True, seed=1) as there, aiohttp.ClientSession() as session:
        assert there.store is not None
        ending = there.gateways[0]
        body = {"model": MODEL, "prompt": [1] * 300, "max_tokens": 100, "stream": True}
        requests = [session.post(f"{ending.url}/v1/completions", json=body) for _ in range(8)]
        answers = await asyncio.gather(*requests)
        getattr(there.store, lost)()
        told = time.monotonic()
        ending.process.send_signal(signal.SIGTERM)
        for answer in answers:
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.to_thread(ending.process.wait, DEADLINE_SECONDS) == 0
        assert time.monotonic() - told < DEFAULT_DELAY_SECONDS + 10.0
        if lost == "freeze":
            there.store.thaw()
