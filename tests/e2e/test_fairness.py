"""Tenants before one engine, through the whole gateway: who floods it hardly delays the others."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from matrixinfer.access.key_file import hash_of
from matrixinfer.app.service import Service
from matrixinfer.config import checked
from matrixinfer.config.access import AccessConfig, TenantConfig
from matrixinfer.config.admission import AdmissionConfig
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from tests.virtual_time import VirtualTimeLoop

from .fleet import config_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.virtual_time]
ENGINE = SimEngineConfig(timing=Timing(step=0.02, prefill_token=0, decode_sequence=0))
"""A second for fifty tokens, however many requests there are: what is slower waits for its turn."""
PLACES = 20


class Client:
    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session
        self.tokens: Counter[str] = Counter()

    async def send(self, tenant: str, tokens: int) -> float:
        """How long a request takes until its last byte."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        body: dict[str, Any] = {"model": "sim", "prompt": f"{random.random()}", "max_tokens": tokens}
        headers = {"Authorization": f"Bearer sk-{tenant}"}
        async with self.session.post(f"{self.url}/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            await response.read()
        self.tokens[tenant] += tokens
        return loop.time() - began

    async def flood(self, tenant: str, rng: random.Random) -> None:
        """Send one request after the other for ever."""
        while True:
            await self.send(tenant, rng.randint(12, 88))


@asynccontextmanager
async def gateway(tokenizer: LocalTokenizer, folder: Path, *tenants: TenantConfig) -> AsyncIterator[Client]:
    keys = folder / "keys.yaml"
    keys.write_text(f"keys: {[{'name': each.name, 'hash': hash_of(f'sk-{each.name}')} for each in tenants]}")
    async with SimEngine(ENGINE, tokenizer) as engine:
        config = msgspec.structs.replace(
            config_of([engine]),
            access=AccessConfig(keys_file=str(keys), tenants=tenants),
            admission=AdmissionConfig(max_concurrent_requests=PLACES, queue_timeout_seconds=3600.0),
        )
        connector = aiohttp.TCPConnector(limit=0)
        async with Service(checked(config)) as service, aiohttp.ClientSession(connector=connector) as session:
            yield Client(service.gateway.url, session)


async def ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def p90(tokenizer: LocalTokenizer, folder: Path, flooding: int) -> float:
    rng, others = random.Random(7), random.Random(8)
    async with gateway(tokenizer, folder, TenantConfig(name="quiet"), TenantConfig(name="flood")) as client:
        flood = [asyncio.create_task(client.flood("flood", others)) for _ in range(flooding)]
        await asyncio.sleep(2)
        taken = []
        for _ in range(150):
            await asyncio.sleep(rng.expovariate(5.0))
            taken.append(asyncio.create_task(client.send("quiet", rng.randint(25, 75))))
        seconds = sorted(await asyncio.gather(*taken))
        await ended(flood)
    return seconds[int(len(seconds) * 0.9)]


async def test_a_tenant_that_floods_does_not_move_the_other_s_p90_by_more_than_a_tenth(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    alone = await p90(tokenizer, tmp_path, flooding=0)
    assert await p90(tokenizer, tmp_path, flooding=40) <= alone * 1.1


async def test_tenants_that_both_flood_get_their_shares_of_tokens(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, tmp_path: Path
) -> None:
    rng = random.Random(3)
    large, small = TenantConfig(name="large", weight=3.0), TenantConfig(name="small")
    async with gateway(tokenizer, tmp_path, large, small) as client:
        flood = [asyncio.create_task(client.flood(name, rng)) for name in ("large", "small") for _ in range(25)]
        await asyncio.sleep(50)
        share = client.tokens["large"] / client.tokens.total()
        await ended(flood)
    assert abs(share - 0.75) <= 0.75 * 0.05
