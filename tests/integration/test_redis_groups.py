"""Tests Cluster and servers behind Sentinel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout
from matrixinfer.index.redis.index import RedisIndex
from tests.servers import Server, server
from tests.waiting import eventually, wait_until

from .redis_support import cluster, opened, sentinels

pytestmark = pytest.mark.server

HASHES = list(range(1, 65))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


async def matched(index: RedisIndex, hashes: list[int]) -> dict[str, int]:
    """Wait for an answer and return it."""
    found: dict[str, int] = {}

    async def answers() -> bool:
        try:
            found.update(await index.match("llama", hashes))
        except IndexUnavailable:
            return False
        return True

    await eventually(answers, pause=0.1)
    return found


async def test_blocks_are_spread_over_a_cluster(nodes: list[Server]) -> None:
    async with opened(nodes[0].config(cluster=True)) as index, opened(nodes[2].config(cluster=True)) as other:
        index.add("llama", "pod-a", HASHES, None)
        index.add("llama", "pod-b", HASHES[:9], None)
        index.remove("llama", "pod-a", HASHES[60:])
        await index.flush()
        for each in (index, other):
            assert await each.match("llama", HASHES) == {"pod-a": 60, "pod-b": 9}
            assert await each.match("qwen", HASHES) == {}
        index.clear("pod-a")
        await index.flush()
        assert await other.match("llama", HASHES) == {"pod-b": 9}
        index.add("llama", "pod-a", HASHES[:3], None)
        await index.flush()
        assert await other.match("llama", HASHES) == {"pod-a": 3, "pod-b": 9}
        assert index.writer.stats.failures == 0
    held = []
    for node in nodes:
        with node.client() as client:
            held.append(sum(1 for _ in client.scan_iter(f"{layout.BLOCKS}*")))
    assert sum(held) == 60
    assert all(held)


async def test_the_last_block_is_found_on_a_cluster(nodes: list[Server]) -> None:
    hashes = list(range(1_000, 2_000))
    async with opened(nodes[0].config(cluster=True)) as index:
        index.add("llama", "pod-e", hashes[:40], None)
        index.add("llama", "pod-e~ends", [hashes[990], hashes[7]], None)
        index.add("llama", "pod-f~ends", hashes[:1], None)
        await index.flush()
        names = ("pod-e", "pod-e~ends", "pod-f~ends", "pod-g~ends")
        expected = {"pod-e": 39, "pod-e~ends": 990, "pod-f~ends": 0}
        assert await index.last("llama", names, hashes) == expected
        assert await index.match("llama", hashes) == {"pod-e": 40}
        index.clear("pod-e~ends")
        await index.flush()
        assert await index.last("llama", names, hashes) == {"pod-e": 39, "pod-f~ends": 0}


async def test_on_a_cluster_another_writer_takes_over_and_the_first_one_notices(nodes: list[Server]) -> None:
    config = nodes[0].config(cluster=True)
    async with opened(config) as second:
        async with opened(config) as first:
            first.add("llama", "pod-c", HASHES[:5], None)
            await first.flush()
            second.add("llama", "pod-c", HASHES[:2], None)
            await second.flush()
            assert (first.writer.is_writer("pod-c"), second.writer.is_writer("pod-c")) == (True, False)
        second.writer._pods["pod-c"].renew_at = float("-inf")
        second.add("llama", "pod-c", HASHES[2:3], None)
        await second.flush()
        assert second.writer.is_writer("pod-c")
        assert (await second.match("llama", HASHES))["pod-c"] == 3


async def test_on_a_cluster_lost_scripts_are_loaded_again(nodes: list[Server]) -> None:
    async with opened(nodes[1].config(cluster=True)) as index:
        for count in (1, 2):
            index.add("llama", "pod-d", HASHES[:count], None)
            await index.flush()
            assert (await index.match("llama", HASHES))["pod-d"] == count
            for node in nodes:
                with node.client() as client:
                    client.script_flush()


async def test_the_next_master_is_found_and_filled(tmp_path: Path) -> None:
    with server(tmp_path / "master") as master:
        follows = ("--replicaof", f"127.0.0.1 {master.port}", "--repl-diskless-sync-delay", "0")
        with server(tmp_path / "replica", *follows) as replica, sentinels(tmp_path, master) as addresses:
            wait_until(lambda: knows_all(addresses))
            async with opened(master.config(host=None, port=None, sentinels=addresses)) as index:
                index.add("llama", "pod-a", HASHES, None)
                await index.flush()
                assert await index.match("llama", HASHES) == {"pod-a": 64}
                with master.client() as client:
                    assert client.wait(1, 5000) == 1
                master.kill()
                index.remove("llama", "pod-a", HASHES[40:])
                assert await matched(index, HASHES)
                await eventually(lambda: not index.writer.waiting and index.writer.stats.resyncs == 2)
                await index.flush()
                assert await matched(index, HASHES) == {"pod-a": 40}
                assert index.writer.stats.resyncs == 2
            with replica.client() as client:
                assert client.info("replication")["role"] == "master"


def knows_all(addresses: tuple[str, ...]) -> bool:
    """Whether every Sentinel knows the replica and the other two Sentinels."""
    states = []
    for address in addresses:
        there = Server(folder=Path(), port=int(address.rpartition(":")[2]))
        with there.client() as client:
            try:
                states.append(client.sentinel_master("mymaster"))
            except redis.ConnectionError:
                return False
    return all(each["num-slaves"] == 1 and each["num-other-sentinels"] == 2 for each in states)


async def test_a_lost_cluster_is_unavailable_like_any_other_server(tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        config = nodes[0].config(cluster=True)
        async with opened(config) as index:
            index.add("llama", "pod-a", HASHES, None)
            await index.flush()
            assert await index.match("llama", HASHES) == {"pod-a": 64}
            for node in nodes:
                node.kill()
            for _ in range(8):
                with pytest.raises(IndexUnavailable):
                    await index.match("llama", HASHES)
            assert index.reader.circuit == "open"


async def test_a_single_server_is_unavailable_as_a_cluster(tmp_path: Path) -> None:
    with server(tmp_path) as alone:
        async with opened(alone.config(cluster=True)) as index:
            with pytest.raises(IndexUnavailable):
                await index.match("llama", HASHES)
