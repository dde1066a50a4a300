"""What happens to the shared index and to those who use it: every request is answered, and afterwards every entry is right.

Real processes: a Valkey server, agents and gateways. `REDIS_FAULTS=FILE` appends the figures as Markdown rows.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from matrixinfer.prompt.local import LocalTokenizer

from ..servers import Server, free_port, server
from .shared import LEASE_SECONDS, Load, World, world

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
FAULT_SECONDS = 2.0


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
) -> Report:
    """Requests before and during a fault; none is lost, and once it is over all becomes right again."""
    async with loaded(there) as before:
        await asyncio.sleep(FAULT_SECONDS)
    async with loaded(there) as during:
        await begin()
        await asyncio.sleep(seconds)
        await end()
        await asyncio.sleep(0.5)
    healed = await there.heals()
    report = Report(before=before, during=during, seconds_to_heal=healed, wrong=await there.wrong())
    print(report.row(fault))
    if file := os.environ.get("REDIS_FAULTS"):
        with Path(file).open("a") as table:
            table.write(report.row(fault) + "\n")
    assert before.answered == before.sent > 20
    assert during.answered == during.sent > 20
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


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "redis") as made:
        yield made


async def test_redis_is_killed_and_comes_back_empty(tmp_path: Path, tokenizer: LocalTokenizer, redis: Server) -> None:
    async with world(tmp_path, tokenizer, redis) as there:

        async def kill() -> None:
            redis.kill()

        async def start() -> None:
            await asyncio.to_thread(redis.start)

        await strike(there, "Redis killed, restarted empty", kill, start)
        assert await degraded(there) > 0


async def test_redis_is_frozen(tmp_path: Path, tokenizer: LocalTokenizer, redis: Server) -> None:
    async with world(tmp_path, tokenizer, redis) as there:

        async def freeze() -> None:
            redis.freeze()

        async def thaw() -> None:
            redis.thaw()

        await strike(there, "Redis frozen", freeze, thaw)
        assert await degraded(there) > 0


async def test_redis_comes_back_as_a_replica_that_takes_no_writes(
    tmp_path: Path, tokenizer: LocalTokenizer, redis: Server
) -> None:
    async with world(tmp_path, tokenizer, redis) as there:

        async def demote() -> None:
            redis.kill()
            redis.options = ("--replicaof", "127.0.0.1", str(free_port()))
            await asyncio.to_thread(redis.start)

        async def promote() -> None:
            with redis.client() as client:
                client.execute_command("REPLICAOF", "NO", "ONE")

        await strike(there, "Redis restarted as replica", demote, promote)


async def test_redis_takes_no_writes(tmp_path: Path, tokenizer: LocalTokenizer, redis: Server) -> None:
    async with world(tmp_path, tokenizer, redis) as there:
        await strike(
            there,
            "Redis read-only",
            setting(redis, "min-replicas-to-write", "1"),
            setting(redis, "min-replicas-to-write", "0"),
        )


async def test_redis_is_out_of_memory(tmp_path: Path, tokenizer: LocalTokenizer, redis: Server) -> None:
    async with world(tmp_path, tokenizer, redis) as there:
        await strike(there, "Redis out of memory", setting(redis, "maxmemory", "1mb"), setting(redis, "maxmemory", "0"))


async def test_redis_is_slow(tmp_path: Path, tokenizer: LocalTokenizer, redis: Server) -> None:
    async with world(tmp_path, tokenizer, redis) as there:

        async def slow() -> None:
            there.wire.delay = 0.2

        async def quick() -> None:
            there.wire.delay = 0.0

        report = await strike(there, "Redis slow (200 ms a reply)", slow, quick)
        assert await degraded(there) > 0
        assert report.during.p99 < report.before.p99 + 150, "requests waited for Redis beyond the deadline"


async def test_connections_are_reset_in_mid_reply(tmp_path: Path, tokenizer: LocalTokenizer, redis: Server) -> None:
    async with world(tmp_path, tokenizer, redis) as there:

        async def cut() -> None:
            there.wire.resets_after = 3

        async def mend() -> None:
            there.wire.resets_after = None

        await strike(there, "connections reset in mid-reply", cut, mend)
        assert await degraded(there) > 0


async def test_an_agent_is_killed_and_another_takes_over(
    tmp_path: Path, tokenizer: LocalTokenizer, redis: Server
) -> None:
    async with world(tmp_path, tokenizer, redis, agents=2) as there:
        await strike(there, "agent killed, another takes over", there.agents[0].end, nothing, seconds=LEASE_SECONDS + 2)


async def test_an_agent_is_paused_and_wakes_up_after_another_took_over(
    tmp_path: Path, tokenizer: LocalTokenizer, redis: Server
) -> None:
    async with world(tmp_path, tokenizer, redis, agents=2) as there:
        agent = there.agents[0]

        async def pause() -> None:
            agent.send(signal.SIGSTOP)

        async def resume() -> None:
            agent.send(signal.SIGCONT)

        await strike(there, "agent paused, another takes over, resumed", pause, resume, seconds=LEASE_SECONDS + 2)


async def test_the_only_agent_is_killed_and_restarted(tmp_path: Path, tokenizer: LocalTokenizer, redis: Server) -> None:
    async with world(tmp_path, tokenizer, redis) as there:

        async def restart() -> None:
            await there.agents[0].start("agent")

        await strike(there, "agent killed and restarted", there.agents[0].end, restart)


async def test_a_gateway_is_killed_under_load(tmp_path: Path, tokenizer: LocalTokenizer, redis: Server) -> None:
    async with world(tmp_path, tokenizer, redis, gateways=2) as there:

        async def kill() -> None:
            await there.gateways[0].end()
            there.admins.pop(0)

        await strike(there, "gateway killed (clients try the other)", kill, nothing)


def setting(redis: Server, name: str, value: str) -> Callable[[], Awaitable[None]]:
    async def change() -> None:
        with redis.client() as client:
            client.config_set(name, value)

    return change


async def nothing() -> None:
    """It stays as it is."""
