"""Tests that the reclaimer deletes exactly the entries that no longer count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.redis import layout, scan
from matrixinfer.index.redis.reclaim import LOCK, Reclaimer
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.warm_start import fill
from matrixinfer.index.warm_start import WarmIndex
from tests.servers import Server, server
from tests.waiting import eventually

from .redis_support import cluster, opened

pytestmark = pytest.mark.server

HASHES = list(range(1, 41))
DAY = 86_400.0


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path) as made:
        yield made


async def entries(store: Store) -> dict[str, int]:
    """Number of entries of each pod, whether they count or not."""
    found: dict[str, int] = {}
    async for page in scan.pages(store):
        for block in page:
            for pod in block.stamps:
                found[pod] = found.get(pod, 0) + 1
    return found


async def test_cleared_and_expired_entries_are_deleted(valkey: Server) -> None:
    async with opened(valkey.config()) as index, Store(valkey.config()) as store:
        index.add("m", "cleared", HASHES, None)
        index.add("m", "alive", HASHES[:30], None)
        await index.flush()
        index.clear("cleared")
        index.add("m", "cleared", HASHES[:4], None)
        await index.flush()
        now = int(time.time())
        with valkey.client() as client:
            for block in HASHES[:7]:
                client.hset(f"{layout.prefix_of('m')}{block}", f"old{layout.SUFFIX}", str(now - 90_000))
                client.hset(f"{layout.prefix_of('m')}{block}", "young", str(now - 80_000))
            client.hset(f"{layout.prefix_of('m')}1", "strange", "no stamp")
            client.hset(f"{layout.prefix_of('m')}1", "ruled", "no stamp")
            client.hset(layout.EPOCHS, "ruled", str(now))
        assert (await entries(store))["cleared"] == 40
        reclaimer = Reclaimer(store, max_age=DAY, keys_per_second=1e9)
        assert await reclaimer.once() == 36 + 7 + 1
        assert await entries(store) == {"cleared": 4, "alive": 30, "young": 7, "strange": 1}
        assert await index.match("m", HASHES) == {"cleared": 4, "alive": 30, "young": 7, "strange": 1}
        assert await reclaimer.once() == 0
    with valkey.client() as client:
        assert client.exists(f"{layout.prefix_of('m')}40") == 0


async def test_a_warm_start_brings_the_reusable_ends_of_wanted_pods(valkey: Server) -> None:
    async with opened(valkey.config()) as index, Store(valkey.config()) as store:
        for pod in ("pod", "pod~ends", "pod~device", "other", "other~ends", "cleared~ends"):
            index.add("m", pod, HASHES[:9] if pod.endswith("~ends") else HASHES, None)
        await index.flush()
        index.clear("cleared~ends")
        await index.flush()
        warm = WarmIndex(MemoryIndex(), max_blocks=1_000, has_own_events=lambda _: False)
        assert await fill(warm, store, pods=lambda: {"pod", "cleared"}, max_age=DAY) == 40 + 9
    names = ("pod", "pod~ends", "pod~device", "other~ends", "cleared~ends")
    assert await warm.last("m", names, HASHES) == {"pod": 39, "pod~ends": 8}
    assert await warm.match("m", HASHES) == {"pod": 40}


async def test_entries_that_were_restamped_meanwhile_stay(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(valkey.config()) as index, Store(valkey.config()) as store:
        index.add("m", "pod", HASHES, None)
        await index.flush()
        index.clear("pod")
        await index.flush()
        reclaimer = Reclaimer(store, max_age=DAY, keys_per_second=1e9)
        seen = reclaimer._reclaim

        async def late(block: scan.Block, floors: layout.Floors) -> int:
            if not index.writer.held("pod"):
                index.add("m", "pod", HASHES, None)
                await index.flush()
            return await seen(block, floors)

        monkeypatch.setattr(reclaimer, "_reclaim", late)
        assert await reclaimer.once() == 0
        assert await index.match("m", HASHES) == {"pod": 40}


async def test_only_one_process_scans_at_a_time(valkey: Server) -> None:
    async with Store(valkey.config()) as store:
        first = Reclaimer(store, max_age=DAY, keys_per_second=1.0)
        second = Reclaimer(store, max_age=DAY, keys_per_second=1.0)
        assert (await first.take_lock(), await second.take_lock()) == (True, False)
        with valkey.client() as client:
            assert 0 < client.ttl(LOCK) <= 60


async def test_on_a_cluster_writes_that_slipped_through_are_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.index.redis.writer.RECONCILE_SECONDS", 1.0)
    with cluster(tmp_path) as nodes:
        config = nodes[0].config(cluster=True)
        async with opened(config) as index, Store(config) as store:
            index.add("m", "pod", HASHES, None)
            index.add("m", "gone", HASHES, None)
            await index.flush()
            index.clear("gone")
            await index.flush()
            assert await Reclaimer(store, max_age=DAY, keys_per_second=1e9).once() == 40
            assert await entries(store) == {"pod": 40}
            client = store.client
            await client.hdel(f"{layout.prefix_of('m')}3", "pod")  # like an earlier writer that wakes up
            await client.hset(f"{layout.prefix_of('m')}5", "pod", "1")
            assert await index.match("m", HASHES) == {"pod": 2}

            async def is_healed() -> bool:
                return await index.match("m", HASHES) == {"pod": 40}

            await eventually(is_healed)
