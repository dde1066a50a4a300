"""What happens to the shared index and to those who use it: every request is answered, and afterwards every entry is right.

Real processes: a Valkey server, agents and gateways. `REDIS_FAULTS=FILE` has each fault last for two seconds
and appends the figures as Markdown rows.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from matrixinfer.prompt.local import LocalTokenizer
from tests.ports import free_port
from tests.servers import server
from tests.waiting import eventually

from .shared import LEASE_SECONDS, Load, World, world

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
FIGURES = os.environ.get("REDIS_FAULTS")
FAULT_SECONDS = 2.0 if FIGURES else 0.0
REQUESTS = 20
"""At least as many are sent before and during a fault."""


@dataclass(frozen=True, kw_only=True)
class Report:
    before: Load
    during: Load
    seconds_to_heal: float
    wrong: int

    def row(self, fault: str) -> str:
        sent, answered = self.before.sent + self.during.sent, self.before.answered + self.during.answered
        added = max(0.0, self.during.p99 - self.before.p99)
        return f"| {fault} | {sent} | {answered} | {added:.0f} ms | {self.seconds_to_heal:.1f} s | {self.wrong} |"


def keep(row: str) -> None:
    if FIGURES:
        with Path(FIGURES).open("a") as table:
            table.write(row + "\n")


@asynccontextmanager
async def loaded(there: World) -> AsyncIterator[Load]:
    """Requests come all the time."""
    load, over = Load(), asyncio.Event()
    task = asyncio.create_task(there.load(load, over))
    try:
        yield load
    finally:
        over.set()
        await task


async def strike(
    there: World,
    fault: str,
    begin: Callable[[], Awaitable[None]],
    end: Callable[[], Awaitable[None]],
    *,
    seconds: float = FAULT_SECONDS,
    degrades: bool = False,
) -> Report:
    """Requests before and during a fault; none is lost, and once it is over all becomes right again."""
    without_index = await degraded(there) if degrades else 0.0

    async def shows() -> bool:
        return not degrades or await degraded(there) > without_index

    async with loaded(there) as before:
        await asyncio.sleep(FAULT_SECONDS)
        await eventually(lambda: before.answered > REQUESTS)
    async with loaded(there) as during:
        await begin()
        await asyncio.sleep(seconds)
        await eventually(lambda: during.answered > REQUESTS)
        await eventually(shows, pause=0.1)
        await end()
        so_far = during.answered
        await eventually(lambda: during.answered > so_far + REQUESTS)
    healed = await there.heals()
    report = Report(before=before, during=during, seconds_to_heal=healed, wrong=await there.wrong())
    print(report.row(fault))
    await asyncio.to_thread(keep, report.row(fault))
    assert before.answered == before.sent
    assert during.answered == during.sent
    assert report.wrong == 0
    return report


async def degraded(there: World, reason: str = "index") -> float:
    """Decisions that had to do without the index, of all gateways that answer."""
    total = 0.0
    for url in there.urls:
        async with there.session.get(f"{url}/metrics") as response:
            series = f'matrixinfer_degraded_total{{reason="{reason}"}} '
            for line in (await response.text()).splitlines():
                if line.startswith(series):
                    total += float(line.removeprefix(series))
    return total


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory, tokenizer: LocalTokenizer) -> AsyncIterator[World]:
    """Two engines, two agents, two gateways; each fault leaves it as it was."""
    folder = tmp_path_factory.mktemp("faults")
    with server(folder / "redis") as redis:
        async with world(folder, tokenizer, redis, gateways=2, agents=2) as made:
            yield made


async def test_redis_is_killed_and_comes_back_empty(there: World) -> None:
    async def kill() -> None:
        there.server.kill()

    async def start() -> None:
        await asyncio.to_thread(there.server.start)

    await strike(there, "Redis killed, restarted empty", kill, start, degrades=True)


async def test_redis_is_frozen(there: World) -> None:
    async def freeze() -> None:
        there.server.freeze()

    async def thaw() -> None:
        there.server.thaw()

    await strike(there, "Redis frozen", freeze, thaw, degrades=True)


async def test_redis_comes_back_as_a_replica_that_takes_no_writes(there: World) -> None:
    async def demote() -> None:
        there.server.kill()
        there.server.options = ("--replicaof", "127.0.0.1", str(free_port()))
        await asyncio.to_thread(there.server.start)

    async def promote() -> None:
        with there.server.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
        there.server.options = ()

    await strike(there, "Redis restarted as replica", demote, promote)


async def test_redis_takes_no_writes(there: World) -> None:
    name = "min-replicas-to-write"
    await strike(there, "Redis read-only", setting(there, name, "1"), setting(there, name, "0"))


async def test_redis_is_out_of_memory(there: World) -> None:
    await strike(there, "Redis out of memory", setting(there, "maxmemory", "1mb"), setting(there, "maxmemory", "0"))


async def test_redis_is_slow(there: World) -> None:
    async def slow() -> None:
        there.wire.delay = 0.2

    async def quick() -> None:
        there.wire.delay = 0.0

    await strike(there, "Redis slow (200 ms a reply)", slow, quick, degrades=True)


async def test_connections_are_reset_in_mid_reply(there: World) -> None:
    async def cut() -> None:
        there.wire.resets_after = 3

    async def mend() -> None:
        there.wire.resets_after = None

    await strike(there, "connections reset in mid-reply", cut, mend, degrades=True)


async def test_an_agent_is_killed_and_another_takes_over(there: World) -> None:
    await strike(there, "agent killed, another takes over", there.agents[0].end, nothing, seconds=LEASE_SECONDS + 2)
    await there.agents[0].start("agent_started")


async def test_an_agent_is_paused_and_wakes_up_after_another_took_over(there: World) -> None:
    async def pause() -> None:
        for agent in there.agents[:1]:
            agent.send(signal.SIGSTOP)

    async def resume() -> None:
        for agent in there.agents[:1]:
            agent.send(signal.SIGCONT)

    await there.agents[1].end()  # so that the first one is the writer
    await there.heals()
    await there.agents[1].start("agent_started")
    await strike(there, "agent paused, another takes over, resumed", pause, resume, seconds=LEASE_SECONDS + 2)


async def test_all_agents_are_killed_and_restarted(there: World) -> None:
    async def kill() -> None:
        for agent in there.agents:
            await agent.end()

    async def restart() -> None:
        for agent in there.agents:
            await agent.start("agent_started")

    await strike(there, "all agents killed, restarted", kill, restart)


async def test_a_gateway_is_killed_under_load(there: World) -> None:
    """The last one, as it does not come back."""

    async def kill() -> None:
        await there.gateways[0].end()
        there.admins.pop(0)

    await strike(there, "gateway killed (clients try the other)", kill, nothing)


def setting(there: World, name: str, value: str) -> Callable[[], Awaitable[None]]:
    async def change() -> None:
        with there.server.client() as client:
            client.config_set(name, value)

    return change


async def nothing() -> None:
    """It stays as it is."""
