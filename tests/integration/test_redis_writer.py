"""Tests writers that compete for one pod: fencing, takeovers and resyncs, during which readers never see an empty pod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.index.redis import writer as module
from matrixinfer.index.redis.commands import Commands, Lease
from matrixinfer.index.redis.reader import BlockReader
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.writer import LEASE_SECONDS, BlockWriter
from tests.servers import Server, server
from tests.waiting import eventually

from .redis_support import BLOCKS

pytestmark = pytest.mark.server

RENEW_SECONDS = LEASE_SECONDS / 3
META = {"block_size": str(BLOCKS.block_size), "hash_scheme": BLOCKS.scheme, "version": "1"}
MAX_AGE = 3_000.0
CHAIN = list(range(1, 401))


class Clock:
    def __init__(self, now: float = 1_700_000_000.5) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def there(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(module, "BATCH", 10)
    valkey.flush()
    return valkey


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def eye(there: Server, clock: Clock) -> AsyncIterator[BlockReader]:
    async with Store(there.config()) as store:
        yield BlockReader(store, max_age=MAX_AGE, clock=clock)


@asynccontextmanager
async def opened(
    there: Server, name: str, clock: Clock, is_known: Callable[[str], bool] | None = None
) -> AsyncIterator[BlockWriter]:
    async with (
        Store(there.config()) as store,
        BlockWriter(store, meta=META, max_age=MAX_AGE, clock=clock, name=name, is_known=is_known) as made,
    ):
        yield made


async def tick(*writers: BlockWriter) -> None:
    """Let writers do the work that is due."""
    for each in writers:
        each._wake()
        await each.flush()


async def held(eye: BlockReader, blocks: Sequence[int]) -> set[int]:
    """The blocks that count for pod-a, each looked up alone."""
    return {block for block in blocks if "pod-a" in await eye.match("llama", [block])}


async def test_a_writer_that_was_paused_cannot_overwrite_a_newer_one(
    there: Server, eye: BlockReader, clock: Clock
) -> None:
    async with opened(there, "old", Clock()) as old, opened(there, "new", clock) as new:
        old.add("llama", "pod-a", CHAIN[:20])
        await old.flush()
        clock.now += LEASE_SECONDS + 1
        new.add("llama", "pod-a", CHAIN[10:15])
        await new.flush()
        assert new.is_writer("pod-a")
        for late in (CHAIN[20:30], CHAIN[30:35]):
            old.add("llama", "pod-a", late)
            old.remove("llama", "pod-a", CHAIN[:12])
            await old.flush()
            assert not old.is_writer("pod-a")
            assert await held(eye, CHAIN[:40]) == set(CHAIN[10:15])
        old.clear("pod-a")
        await old.flush()
        assert old.stats.fenced == 1
        assert new.is_writer("pod-a")
        assert await held(eye, CHAIN[:30]) == set(CHAIN[10:15])


async def test_a_standby_takes_over_once_the_lease_is_over(there: Server, eye: BlockReader, clock: Clock) -> None:
    async with opened(there, "hung", Clock()) as hung, opened(there, "standby", clock) as standby:
        hung.add("llama", "pod-a", CHAIN[:8])
        await hung.flush()
        standby.add("llama", "pod-a", CHAIN[:5])
        standby.add("llama", "pod-b", CHAIN[:3])
        await standby.flush()
        assert not standby.is_writer("pod-a")
        assert await eye.match("llama", CHAIN) == {"pod-a": 8, "pod-b": 3}
        clock.now += RENEW_SECONDS
        standby.remove("llama", "pod-a", CHAIN[4:5])
        await tick(standby)
        assert not standby.is_writer("pod-a")
        clock.now += LEASE_SECONDS - RENEW_SECONDS + 1
        await tick(standby)
        assert standby.is_writer("pod-a")
        assert await eye.match("llama", CHAIN) == {"pod-a": 4, "pod-b": 3}


async def test_a_released_lease_is_taken_at_the_next_tick(there: Server, eye: BlockReader, clock: Clock) -> None:
    async with opened(there, "standby", clock) as standby:
        async with opened(there, "leaves", clock) as leaves:
            leaves.add("llama", "pod-a", CHAIN[:8])
            await leaves.flush()
            standby.add("llama", "pod-a", CHAIN[:5])
            await standby.flush()
            assert not standby.is_writer("pod-a")
        assert await eye.match("llama", CHAIN) == {"pod-a": 8}
        clock.now += RENEW_SECONDS
        await tick(standby)
        assert standby.is_writer("pod-a")
        assert await eye.match("llama", CHAIN) == {"pod-a": 5}


async def test_a_clock_that_goes_back_does_not_block_other_writers_for_long(there: Server, clock: Clock) -> None:
    async with opened(there, "crashes", clock) as crashes:
        crashes.follow("pod-a")
        await crashes.flush()
        clock.now -= 3_600
        await tick(crashes)
        other = Clock(clock.now + LEASE_SECONDS + 1)
        async with opened(there, "standby", other) as standby:
            standby.follow("pod-a")
            await standby.flush()
            assert standby.is_writer("pod-a")


async def test_changes_dropped_by_an_overflow_are_written_again(
    there: Server, eye: BlockReader, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_MAX", 10)
    async with opened(there, "writer", clock) as made:
        made.add("llama", "pod-a", CHAIN[:8])
        await made.flush()
        clock.now += 3  # the lease is not renewed yet, so the next stamps exceed its next epoch
        made.add("llama", "pod-a", CHAIN[8:16])
        await made.flush()
        clock.now += 1
        made.remove("llama", "pod-a", CHAIN[6:16])
        made.add("llama", "pod-a", CHAIN[20:30])
        await made.flush()
        assert (made.stats.overflows, made.stats.resyncs) == (1, 2)
        assert await held(eye, CHAIN[:40]) == {*CHAIN[:6], *CHAIN[20:30]}
        made.clear("pod-a")
        made.add("llama", "pod-a", CHAIN[:20])
        await made.flush()
        assert await held(eye, CHAIN[:40]) == set(CHAIN[:20])


async def test_a_server_that_was_replaced_is_filled_without_a_write(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.02)
    with server(tmp_path) as there:
        async with opened(there, "writer", clock) as made, Store(there.config()) as store:
            eye = BlockReader(store, max_age=MAX_AGE, clock=clock)
            made.add("llama", "pod-a", CHAIN)
            await made.flush()
            there.kill()
            there.start()
            clock.now += RENEW_SECONDS
            await eventually(lambda: made.stats.resyncs == 2 and not made.needs_resync("pod-a"))
            assert await eye.match("llama", CHAIN) == {"pod-a": 400}
            with there.client() as client:
                assert client.hgetall("matrix:kv:meta:llama") == META


async def test_another_server_with_the_same_data_is_not_trusted(
    there: Server, eye: BlockReader, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(there, "writer", clock) as made:
        made.add("llama", "pod-a", CHAIN[:5])
        await made.flush()
        with there.client() as client:
            client.hdel(f"matrix:kv:block:llama@{CHAIN[1]}", "pod-a")  # a write that this server did not get

        async def other(_: Store) -> str:
            return "another server"

        monkeypatch.setattr(Store, "server_id", other)
        clock.now += RENEW_SECONDS
        await eventually(lambda: made.stats.resyncs == 2 and not made.needs_resync("pod-a"))
        assert await eye.match("llama", CHAIN) == {"pod-a": 5}


async def test_blocks_are_restamped_within_a_third_of_the_maximum_age(
    there: Server, eye: BlockReader, clock: Clock
) -> None:
    keys = [f"matrix:kv:block:llama@{block}" for block in CHAIN[:50]]
    async with opened(there, "writer", clock) as made:
        made.add("llama", "pod-a", CHAIN[:50])
        made.remove("llama", "pod-a", CHAIN[30:50])
        await made.flush()
        with there.client() as client:
            client.hset(keys[0], "stranger.ns.svc.cluster.local", str(int(clock.now)))
            for _ in range(60):
                clock.now += 90
                for _ in range(4):  # ten blocks a tick
                    await tick(made)
                # Other writers delete fields that are too old.
                for key in keys:
                    for field, stamp in client.hgetall(key).items():
                        if int(stamp) < clock.now - MAX_AGE:
                            client.hdel(key, field)
                        elif field == "pod-a":
                            assert int(stamp) >= clock.now - MAX_AGE / 3
            assert set(client.hgetall(keys[0])) == {"pod-a"}
    assert await eye.match("llama", CHAIN) == {"pod-a": 30}  # even without a living writer
    assert made.stats.restamped >= 30 * 4
    assert made.stats.resyncs == 1


@pytest.mark.parametrize(("before", "after"), [(400, 300), (200, 400), (400, 400)])
async def test_readers_never_see_an_empty_pod_during_a_resync(
    there: Server, eye: BlockReader, clock: Clock, before: int, after: int
) -> None:
    async with opened(there, "first", Clock()) as first, opened(there, "second", clock) as second:
        first.add("llama", "pod-a", CHAIN[:before])
        await first.flush()
        seen = [(await eye.match("llama", CHAIN)).get("pod-a", 0)]
        clock.now += LEASE_SECONDS + 1
        second.add("llama", "pod-a", CHAIN[:after])
        flushed = asyncio.create_task(second.flush())
        while not flushed.done():
            seen.append((await eye.match("llama", CHAIN)).get("pod-a", 0))
        await flushed
        assert await eye.match("llama", CHAIN) == {"pod-a": after}
    assert len(seen) > 3
    assert min(seen) >= min(before, after)


async def test_a_pod_that_comes_back_during_its_release_is_not_lost(
    there: Server, eye: BlockReader, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(there, "writer", clock) as made:
        release = Commands.release

        async def released(commands: Commands, lease: Lease, **more: Any) -> Any:
            await release(commands, lease, **more)
            made.add("llama", "pod-a", CHAIN[:3])

        made.add("llama", "pod-a", CHAIN[:9])
        await made.flush()
        with monkeypatch.context() as patch:
            patch.setattr(Commands, "release", released)
            made.forget("pod-a")
            await made.flush()
        await tick(made)
        assert await eye.match("llama", CHAIN) == {"pod-a": 3}
        made.forget("pod-a")
        await made.flush()
        assert await eye.match("llama", CHAIN) == {}
        assert made.pods == []


async def test_remaining_changes_are_written_at_the_end(there: Server, eye: BlockReader, clock: Clock) -> None:
    async with opened(there, "leaves", clock) as leaves:
        leaves.add("llama", "pod-a", CHAIN[:8])
        await leaves.flush()
        leaves.remove("llama", "pod-a", CHAIN[4:8])
    assert await eye.match("llama", CHAIN) == {"pod-a": 4}


async def test_a_writer_that_does_not_know_the_content_of_a_pod_releases_it(
    there: Server, eye: BlockReader, clock: Clock
) -> None:
    known = {"pod-a"}
    async with (
        opened(there, "blind", clock, is_known=known.__contains__) as blind,
        opened(there, "sees", clock) as sees,
    ):
        blind.add("llama", "pod-a", CHAIN[:8])
        await blind.flush()
        sees.add("llama", "pod-a", CHAIN[:5])
        await sees.flush()
        assert (blind.is_writer("pod-a"), sees.is_writer("pod-a")) == (True, False)
        known.clear()  # its connection to the engine is lost
        await tick(blind)
        assert blind.is_writer("pod-a")
        clock.now += LEASE_SECONDS + 1
        await eventually(lambda: not blind.is_writer("pod-a"))
        await tick(sees)
        assert sees.is_writer("pod-a")
        assert await eye.match("llama", CHAIN) == {"pod-a": 5}
        await tick(blind)
        assert not blind.is_writer("pod-a")


async def test_a_pod_that_leaves_before_a_resync_is_cleared(there: Server, eye: BlockReader, clock: Clock) -> None:
    known = {"pod-a"}
    async with opened(there, "writer", clock, is_known=known.__contains__) as made:
        made.add("llama", "pod-a", CHAIN[:8])
        await made.flush()
        made._pods["pod-a"].needs_resync = True
        known.clear()  # its feed is gone already
        made.forget("pod-a")
        await made.flush()
        assert await eye.match("llama", CHAIN) == {}
        assert made.pods == []


async def test_leases_are_renewed_while_much_is_written(there: Server, eye: BlockReader, clock: Clock) -> None:
    async with opened(there, "writer", clock) as made, opened(there, "standby", clock) as standby:
        made.add("llama", "pod-b", CHAIN[:1])
        await made.flush()
        write = Commands.write

        async def slowly(commands: Commands, *args: Any, **more: Any) -> None:
            clock.now += RENEW_SECONDS
            await write(commands, *args, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Commands, "write", slowly)
            made.add("llama", "pod-a", CHAIN[:100])
            await made.flush()
        standby.add("llama", "pod-b", CHAIN[:2])
        await standby.flush()
        assert made.is_writer("pod-b")
        assert not standby.is_writer("pod-b")
        assert made.stats.fenced == 0
