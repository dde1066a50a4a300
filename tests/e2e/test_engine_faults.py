"""Engines fail, in every way and under every load: no request is lost, and soon none fails.

Real processes: a gateway and three engines, or two of two ranks. `make fault-table` has each fault last longer, with
the gateway's own times of ejection, and writes the figures into docs/operations.md.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.waiting import eventually

from .fault_table import PAGE, replaced, rows
from .fault_world import SETTLE_SECONDS, Load, World, assert_none_lost, fault_world, strike

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
WRITES = bool(os.environ.get("FAULT_TABLE"))
FAULTS = ("500", "503", "429", "reset", "garbage", "slow", "freeze", "kill", "restart")
RANK_FAULTS = ("500", "503", "reset", "garbage")
PAIRS = (("500", "freeze"), ("reset", "kill"), ("garbage", "503"), ("restart", "429"))
LOADS = {"idle": (1, False), "12 in flight": (12, False), "12 streams": (12, True)}
"""How many clients there are, and whether they stream."""
COMBINED_LOADS = LOADS if WRITES else ("12 in flight",)
MEASURED_SECONDS = 3.0 if WRITES else 1.0
EJECT, LONGEST = (5.0, 5.0) if WRITES else (0.5, 1.0)


@pytest.fixture(scope="module")
def table() -> list[str]:
    """Rows of the table, which the last test writes."""
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with fault_world(tmp_path_factory.mktemp("faults"), eject=EJECT, longest=LONGEST) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ranked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Two engines of two ranks each."""
    async with fault_world(tmp_path_factory.mktemp("ranks"), engines=2, ranks=2, eject=EJECT, longest=LONGEST) as made:
        yield made


async def measure(world: World, faults: tuple[str, ...], name: str, load_name: str, table: list[str]) -> set[str]:
    """Requests before, during and after faults; none is lost. Returns the endpoints that were left out meanwhile."""
    clients, stream = LOADS[load_name]
    struck = await strike(world, faults, clients=clients, stream=stream, measured=MEASURED_SECONDS)
    load, left_out = struck.load, struck.left_out
    after = f"{max(left_out.values()):.1f} s" if left_out else "never"
    table.append(
        f"| {name} | {load_name} | {load.sent:,} | {len(load.answered):,} | {len(load.failed):,} "
        f"| {100 * struck.share:.1f} % | {after} | {struck.recovered:.1f} s |"
    )
    print(table[-1], sorted({kind for _, kind in load.failed}), set(left_out))
    assert struck.share >= 0.99
    return set(left_out)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_no_request_is_lost_and_soon_none_fails(world: World, table: list[str], fault: str, load: str) -> None:
    left_out = await measure(world, (fault,), fault, load, table)
    assert left_out <= {"e0"}


@pytest.mark.parametrize("load", COMBINED_LOADS)
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
async def test_two_engines_may_fail_at_once(world: World, table: list[str], pair: tuple[str, str], load: str) -> None:
    left_out = await measure(world, pair, " and ".join(pair), load, table)
    assert left_out <= {"e0", "e1"}


@pytest.mark.parametrize("load", COMBINED_LOADS)
@pytest.mark.parametrize("fault", RANK_FAULTS)
async def test_a_rank_that_fails_is_left_out_alone(ranked: World, table: list[str], fault: str, load: str) -> None:
    left_out = await measure(ranked, (fault,), f"{fault}, one rank of four", load, table)
    assert left_out == {"e0@dp0"}


async def test_when_all_engines_are_down_requests_fail_at_once_and_then_succeed_again(world: World) -> None:
    async with world.loaded(12, stream=False) as load:
        await eventually(lambda: len(load.answered) > 24)
        for number in range(3):
            await world.inflict("kill", number)
        await asyncio.sleep(1.0)
        down = time.monotonic()
        await asyncio.sleep(1.0)
        assert load.share_from(down) == 0.0
        assert {kind for at, kind in load.failed if at >= down} <= {"502", "503"}
        assert len([at for at, _ in load.failed if at >= down]) > 12
        for number in range(3):
            await world.heal("kill", number)
        up = time.monotonic()
        await asyncio.sleep(SETTLE_SECONDS + 1.0)
    assert_none_lost(load)
    assert load.share_from(up + SETTLE_SECONDS) >= 0.99
    assert any(at >= up for at, _ in load.answered)
    await eventually(world.is_whole, pause=0.05)


@pytest.mark.parametrize("pair", [("500", "500"), ("500", "reset"), ("garbage", "reset")], ids=" and ".join)
async def test_two_engines_that_fail_alike_do_not_excuse_each_other(world: World, pair: tuple[str, str]) -> None:
    left_out = await measure(world, pair, " and ".join(pair), "12 in flight", [])
    assert left_out == {"e0", "e1"}


async def test_a_client_whose_requests_fail_at_every_engine_ejects_none(world: World) -> None:
    cursed, over, before = Load(), asyncio.Event(), await world.ejections()

    async def attack() -> None:
        while not over.is_set():
            await world.ask(cursed, stream=False, prompt="cursed")

    async with asyncio.TaskGroup() as group, world.loaded(6, stream=False) as load:
        for _ in range(4):
            group.create_task(attack())
        await eventually(lambda: len(cursed.failed) > 100 and len(load.answered) > 100)
        over.set()
    assert {kind for _, kind in cursed.failed} == {"500"}
    assert cursed.answered == []
    assert load.failed == []
    assert await world.ejections() == before
    assert_none_lost(load)


async def test_a_client_that_is_told_to_come_back_knows_when(world: World) -> None:
    for number in range(3):
        await world.inflict("503", number)
    async with world.session.post(f"{world.gateway}/v1/completions", json={"model": "m", "prompt": "x"}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
    for number in range(3):
        await world.heal("503", number)
    await eventually(world.is_whole, pause=0.05)


async def test_the_table_of_the_documentation_has_every_fault_under_every_load(table: list[str]) -> None:
    if WRITES:
        await asyncio.to_thread(PAGE.write_text, replaced(PAGE.read_text(), table))
    names = [*FAULTS, *(" and ".join(pair) for pair in PAIRS), *(f"{fault}, one rank of four" for fault in RANK_FAULTS)]
    assert set(rows(PAGE.read_text())) == {(name, load) for name in names for load in LOADS}
