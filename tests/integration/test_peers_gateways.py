"""Two gateways before the same engines decide as one would, as each hears what the other sends."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrixinfer.config import RedisConfig, SchedulerConfig
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.e2e.fleet import Fleet, gateway
from tests.servers import Server, server
from tests.waiting import eventually

PATH, PODS = "/v1/completions", 4
Json = dict[str, Any]


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path) as made:
        yield made


@asynccontextmanager
async def running(
    tokenizer: LocalTokenizer, timing: Timing, redis: RedisConfig | None, *, gateways: int
) -> AsyncIterator[Sequence[Fleet]]:
    """Gateways that break ties differently, before the same engines."""
    config = SimEngineConfig(model="m", num_blocks=20_000, timing=timing)
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SimEngine(config, tokenizer)) for _ in range(PODS)]
        fleets = [
            await stack.enter_async_context(gateway(engines, scheduler=SchedulerConfig(seed=seed), redis=redis))
            for seed in range(gateways)
        ]
        if redis is not None and redis.share_load:
            for fleet in fleets:
                await fleet.has_peers(gateways - 1)
        yield fleets


def redis_of(valkey: Server, *, share: bool = True) -> RedisConfig:
    return RedisConfig(host="127.0.0.1", port=valkey.port, share_load=share)


def prompt(seed: int, tokens: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(0, 100_000, tokens).tolist()
    return drawn


def body(tokens: list[int], max_tokens: int = 1) -> Json:
    return {"model": "m", "prompt": tokens, "max_tokens": max_tokens}


def others_of(fleet: Fleet) -> int:
    """What a gateway hears that others have in flight."""
    return sum(load.in_flight for load in fleet.service.state.peer_loads.totals(time.monotonic()).values())


# Bursts of equal prompts

LONG_PREFILL = Timing(step=0.002, prefill_token=0.0008, decode_sequence=0.0001)
PROMPTS, EACH = 4, 4


async def burst(fleets: Sequence[Fleet], *, share: bool) -> float:
    """How many pods compute each of some new prompts, on average, when each is sent several times in turn.

    Where gateways share, the last one hears of each prompt before it is sent again.
    """
    async with asyncio.TaskGroup() as group:
        sent: dict[int, list[asyncio.Task[tuple[Json, str | None]]]] = {}
        for number in range(PROMPTS):
            ask = body(prompt(number, 1920))
            sent[number] = [group.create_task(fleets[0].post(PATH, ask))]
            if share:
                await is_known(fleets[-1], ask)
        for turn in range(1, EACH):
            for number in range(PROMPTS):
                ask = body(prompt(number, 1920))
                sent[number].append(group.create_task(fleets[turn % len(fleets)].post(PATH, ask)))
                await asyncio.sleep(0.01)
    return sum(len({task.result()[1] for task in tasks}) for tasks in sent.values()) / PROMPTS


async def is_known(fleet: Fleet, ask: Json) -> None:
    """Wait until a gateway knows where a prompt is on its way."""

    async def knows() -> bool:
        decision = await fleet.explain(PATH, ask)
        return any(pod["credit"] for pod in decision["pods"].values())

    await eventually(knows)


async def test_a_burst_of_equal_prompts_stays_together_as_with_one_gateway(
    tokenizer: LocalTokenizer, valkey: Server
) -> None:
    figures = []
    for redis, gateways in ((None, 1), (redis_of(valkey), 2), (redis_of(valkey, share=False), 2)):
        async with running(tokenizer, LONG_PREFILL, redis, gateways=gateways) as fleets:
            figures.append(await burst(fleets, share=redis is None or redis.share_load))
    one, shared, alone = figures
    print(f"pods per prompt: one gateway {one}, two {shared}, two that share nothing {alone}")
    assert shared <= one + 0.25
    assert alone > shared + 0.25


# One prefix that everything shares

SLOW_DECODE = Timing(step=0.04, prefill_token=0.000005, decode_sequence=0.0)
SHARED, UNIQUE, REQUESTS = 6_000, 200, 24


async def crowd(fleets: Sequence[Fleet]) -> Counter[str]:
    """How many of some requests in flight together are at each pod, when one pod holds nearly all of their prompts."""
    shared = prompt(0, SHARED)
    await fleets[0].post(PATH, body(shared))
    for fleet in fleets:
        await fleet.settled()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for number, fleet in enumerate(islice(cycle(fleets), REQUESTS)):
            ask = body([*shared, *prompt(number + 1, UNIQUE)], max_tokens=60)
            tasks.append(group.create_task(fleet.post(PATH, ask)))
            await asyncio.sleep(0.05)
    return Counter(str(task.result()[1]) for task in tasks)


async def test_no_pod_is_overloaded_by_gateways_that_each_think_it_free(
    tokenizer: LocalTokenizer, valkey: Server
) -> None:
    most = []
    for redis, gateways in ((None, 1), (redis_of(valkey), 2), (redis_of(valkey, share=False), 2)):
        async with running(tokenizer, SLOW_DECODE, redis, gateways=gateways) as fleets:
            most.append(max((await crowd(fleets)).values()))
    one, shared, alone = most
    print(f"of {REQUESTS} requests at the busiest pod: one gateway {one}, two {shared}, two that share nothing {alone}")
    assert shared < alone
    assert shared <= one + 3


# Without a server

QUICK = Timing(step=0.01, prefill_token=0.0, decode_sequence=0.0)


async def test_no_request_fails_when_the_server_goes_and_peers_are_forgotten(
    tokenizer: LocalTokenizer, valkey: Server
) -> None:
    async with running(tokenizer, QUICK, redis_of(valkey), gateways=2) as fleets, asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(fleets[0].post(PATH, body(prompt(number, 300), max_tokens=500)))
        await eventually(lambda: others_of(fleets[1]) == 8)
        valkey.kill()
        for number in range(30):  # each is answered, or this fails
            group.create_task(fleets[number % 2].post(PATH, body(prompt(number, 300))))
        await eventually(lambda: others_of(fleets[1]) == 0)
        assert await fleets[1].metric("matrixinfer_peers") == 0
        valkey.start()
        await fleets[1].has_peers(1)


async def test_nothing_is_shared_where_that_is_not_wanted(tokenizer: LocalTokenizer, valkey: Server) -> None:
    async with running(tokenizer, QUICK, redis_of(valkey, share=False), gateways=1) as fleets:
        await fleets[0].post(PATH, body(prompt(0, 300)))
        with valkey.client() as client:
            assert client.pubsub_channels() == []
        async with fleets[0].session.get(f"{fleets[0].url}/metrics") as response:
            assert "matrixinfer_peers" not in await response.text()


async def test_messages_are_counted(tokenizer: LocalTokenizer, valkey: Server) -> None:
    async with running(tokenizer, QUICK, redis_of(valkey), gateways=2) as fleets:
        with valkey.client() as client:
            client.publish("matrix:kv:gateways", "what?")
        series = 'matrixinfer_peer_messages_total{kind="%s"}'
        assert await fleets[0].metric(series % "sent") > 0
        assert await fleets[0].metric(series % "received") > 0

        async def is_counted() -> bool:
            return await fleets[0].metric(series % "malformed") == 1

        await eventually(is_counted)
        assert await fleets[0].metric(series % "dropped") == 0
