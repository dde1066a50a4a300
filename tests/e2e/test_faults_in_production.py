"""The faults of engines again, with everything on: TLS, two workers, keys, limits, salts, a queue, routes and a log.

Nothing may be lost here that is not lost without it, and whatever a request took is given back.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from matrixinfer.access.key_file import hash_of
from tests import servers
from tests.waiting import eventually

from .fault_world import Front, Load, World, assert_none_lost, fault_world, strike
from .production import ALIAS, FEW, FEW_KEY, TENANTS, WORKERS, production, written

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
CLIENTS, CONCURRENT = 16, 48
FAULTS = (
    *(("503",), ("reset",), ("garbage",), ("slow",), ("freeze",)),
    *(("500", "kill"), ("restart", "429")),
)
PLACES = 8
"""Half of the clients wait."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("production")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(folder: Path, valkey: servers.Server) -> AsyncIterator[World]:
    settings = production(folder, redis=valkey.port, places=PLACES, concurrent=CONCURRENT)
    front = Front(
        more="\n".join(f"{key}: {json.dumps(value)}" for key, value in settings.config.items()),
        context=settings.context,
        keys=settings.keys,
        model=ALIAS,
        workers=WORKERS,
    )
    async with fault_world(folder, front=front) as made:
        yield made


async def nothing_is_taken(world: World) -> bool:
    """Whether no request holds a place, waits for one, or is charged to a pod."""
    return not await world.metric("matrixinfer_admission_requests{") and not await world.metric(
        "matrixinfer_in_flight{"
    )


@pytest.mark.parametrize("faults", FAULTS, ids=" and ".join)
async def test_no_request_is_lost_and_soon_none_fails(world: World, faults: tuple[str, ...]) -> None:
    struck = await strike(world, faults, clients=CLIENTS, stream=None)
    print(Counter(kind for _, kind in struck.load.failed), struck.share, struck.recovered)
    assert set(struck.left_out) <= {f"e{i}" for i in range(len(faults))}
    assert struck.share >= 0.99
    await eventually(lambda: nothing_is_taken(world), pause=0.05)


async def test_a_client_whose_requests_fail_at_every_engine_ejects_none(world: World) -> None:
    cursed, before = Load(), await world.ejections()
    async with world.loaded(6, stream=None) as load:
        for _ in range(40):
            await world.ask(cursed, stream=False, prompt="cursed")
    assert {kind for _, kind in cursed.failed} == {"500"}
    assert len(cursed.failed) == 40
    assert load.failed == []
    assert await world.ejections() == before
    assert_none_lost(load)


async def test_whoever_has_no_key_reaches_no_engine_and_takes_no_place(world: World) -> None:
    body = {"model": ALIAS, "prompt": "x"}
    for headers in ({}, {"Authorization": "Bearer sk-none"}):
        async with world.session.post(f"{world.gateway}/v1/completions", json=body, headers=headers) as response:
            assert response.status == 401
    with pytest.raises(aiohttp.ClientError):
        await world.session.post(f"{world.gateway.replace('https', 'http')}/v1/completions", json=body)
    await eventually(lambda: nothing_is_taken(world), pause=0.05)


async def test_new_keys_and_routes_hold_at_every_worker_under_load(world: World, folder: Path) -> None:
    config = folder / "gateway.yaml"
    before = config.read_text()
    keys = json.loads((folder / "keys.yaml").read_text())["keys"]
    more = [*keys, {"name": "new", "tenant": "small", "hash": hash_of("sk-new")}]
    (folder / "more.yaml").write_text(json.dumps({"keys": more}))

    async def status(model: str) -> int:
        body, headers = {"model": model, "prompt": "x"}, {"Authorization": "Bearer sk-new", "Connection": "close"}
        async with world.session.post(f"{world.gateway}/v1/completions", json=body, headers=headers) as response:
            return response.status

    async def reload() -> dict[str, object]:
        async with world.session.post(f"{world.admin}/admin/reload") as response:
            return dict(await response.json())

    async with world.loaded(CLIENTS, stream=None) as load:
        await eventually(lambda: len(load.answered) > CLIENTS)
        config.write_text(before.replace("keys.yaml", "more.yaml").replace('["alias"]', '["alias", "other"]'))
        outcome = await reload()
        assert outcome["result"] in ("applied", "unchanged"), outcome  # the file is looked at as well
        assert [await status("other") for _ in range(12)] == [200] * 12
        config.write_text(before)
        await reload()
        assert [await status("m") for _ in range(12)] == [401] * 12
    assert load.failed == []
    assert_none_lost(load)


async def test_a_limit_holds_over_all_workers_whatever_comes_at_once(world: World) -> None:
    load = Load()
    async with asyncio.TaskGroup() as group:
        for number in range(4 * FEW):
            group.create_task(world.ask(load, stream=number % 2 == 0, key=FEW_KEY))
    assert FEW <= len(load.answered) <= FEW + WORKERS
    assert {kind for _, kind in load.failed} == {"429"}


async def test_tenants_get_their_shares_over_all_workers_under_overload(world: World) -> None:
    counts, over = Counter[str](), asyncio.Event()

    async def client(tenant: str) -> None:
        # A connection of its own, so that clients stay at their workers: each has a queue of its own.
        async with world.connection() as session:
            while not over.is_set():
                load = Load()
                await world.ask(load, stream=True, key=f"sk-{tenant}", session=session)
                assert load.failed == []
                counts[tenant] += 1

    async with asyncio.TaskGroup() as group:
        for tenant in TENANTS:
            for _ in range(5 * PLACES):
                group.create_task(client(tenant))
        await eventually(lambda: counts.total() > 10 * PLACES)  # what each had saved while it did not wait is used up
        counts.clear()
        await eventually(lambda: counts.total() >= 200)
        share = counts["large"] / counts.total()
        over.set()
    print(counts, share)
    assert abs(share - 0.75) <= 0.75 * 0.05


async def test_every_request_that_was_sent_is_in_the_log_and_no_limit_leaks(world: World, folder: Path) -> None:
    async def all_are_logged() -> bool:
        callers = Counter(each.get("caller") for each in written(folder))
        return sum(callers[each] for each in ("key-large", "key-small", "few")) == sent

    sent = next(world.numbers)
    await eventually(all_are_logged, pause=0.1)
    async with world.loaded(CONCURRENT, stream=False) as load:  # as many of each key as it may have at a time
        await eventually(lambda: len(load.answered) > 100)
    assert load.failed == []
    assert {each["tenant"] for each in written(folder) if each["status"] == 200} == set(TENANTS)
