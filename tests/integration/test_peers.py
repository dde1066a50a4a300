"""Two ends of the channel between gateways, over a real server."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import structlog

from matrixinfer.config import RedisConfig
from matrixinfer.index.redis.store import Store
from matrixinfer.scheduler.framework import Trust
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.channel import CHANNEL, RedisChannel
from matrixinfer.traffic.peers.link import Peers
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.message import Load, Prompt, encode
from tests.ports import free_port
from tests.servers import Server, cluster_options, server
from tests.waiting import DEADLINE_SECONDS, eventually

CHAIN = list(range(100, 110))
TRUST: dict[str, Trust] = {"sure": "exact", "unsure": "partial"}


class End:
    """One gateway's part."""

    def __init__(self, store: Store) -> None:
        self.load = LoadLedger(time.monotonic, 60.0)
        self.history = RoutingHistory()
        self.loads = PeerLoads(uuid.uuid4().hex)
        self.peers = Peers(
            RedisChannel(store), loads=self.loads, load=self.load, history=self.history, trust_of=TRUST.get
        )

    def totals(self) -> dict[str, Load]:
        return dict(self.loads.totals(time.monotonic()))


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path) as made:
        yield made


def config_of(valkey: Server, *, cluster: bool = False) -> RedisConfig:
    return RedisConfig(host="127.0.0.1", port=valkey.port, cluster=cluster)


@asynccontextmanager
async def ends(config: RedisConfig) -> AsyncIterator[tuple[End, End]]:
    """Two gateways that have received from each other."""
    async with Store(config) as here, Store(config) as there, AsyncExitStack() as stack:
        one, other = End(here), End(there)
        await stack.enter_async_context(one.peers)
        await stack.enter_async_context(other.peers)
        await eventually(lambda: one.peers.count() == other.peers.count() == 1)
        yield one, other


async def test_load_and_prompts_are_received(valkey: Server) -> None:
    async with ends(config_of(valkey)) as (one, other):
        charge = one.load.charge("sure", "m", hashes=CHAIN, start=4, queued_tokens=70)
        await eventually(lambda: other.totals() == {"sure": Load(1, 70)})
        assert other.load.pending("sure", "m", CHAIN, 4) == 6
        assert (other.load.in_flight("sure"), one.totals()) == (0, {})
        charge.first_byte()
        await eventually(lambda: other.totals() == {"sure": Load(1, 0)})
        charge.release()
        await eventually(lambda: other.totals() == {})
        assert one.peers.stats.malformed == one.peers.dropped == other.peers.dropped == 0


async def test_what_was_computed_is_remembered_where_events_do_not_tell_all(valkey: Server) -> None:
    async with ends(config_of(valkey)) as (one, other):
        for name in ("sure", "unsure", "unknown"):
            one.history.record_sent(name, "m", CHAIN)
        await eventually(lambda: "unsure" in other.history)
        assert other.history.match("unsure", "m", CHAIN) == 10
        assert "sure" not in other.history
        assert "unknown" not in other.history
        assert [other.load.pending(name, "m", CHAIN, 0) for name in ("sure", "unsure", "unknown")] == [10, 10, 0]


async def test_what_was_sent_is_recognised_by_its_bytes_at_other_gateways_too(valkey: Server) -> None:
    async with ends(config_of(valkey)) as (one, other):
        charge = one.load.charge("sure", "m", hashes=(), start=0, queued_tokens=70, chunks=CHAIN)
        await eventually(lambda: other.load.pending("sure", "m", CHAIN, 0) == 10)
        charge.cancel()
        for name in ("sure", "unknown"):
            one.history.computed(name, "m", (), is_exact=True, chunks=CHAIN)
        await eventually(lambda: other.history.match_chunks("sure", "m", CHAIN) == 10)
        assert other.history.match("sure", "m", CHAIN) == 0
        assert "unknown" not in other.history


async def test_what_is_malformed_is_counted_and_survived(valkey: Server) -> None:
    async with ends(config_of(valkey)) as (one, other):
        good, _ = encode("another", {"sure": Load(1, 1)}, [Prompt("sure", "m", False, CHAIN)])
        with valkey.client() as client:
            for end in range(len(good)):
                client.publish(CHANNEL, good[:end])
            client.publish(CHANNEL, good)
        await eventually(lambda: one.peers.count() == other.peers.count() == 2)
        assert one.peers.stats.malformed == other.peers.stats.malformed == len(good)
        assert one.totals() == {"sure": Load(1, 1)}


async def test_a_lost_server_costs_one_line_and_is_found_again(valkey: Server) -> None:
    with structlog.testing.capture_logs() as lines:
        async with ends(config_of(valkey)) as (one, other):
            one.load.charge("sure", "m", hashes=CHAIN, start=0, queued_tokens=70)
            await eventually(lambda: other.totals() == {"sure": Load(1, 70)})
            valkey.kill()
            await eventually(lambda: other.totals() == {})
            assert other.peers.count() == 0
            for number in range(1000):
                one.load.charge("sure", "m", hashes=[number], start=0, queued_tokens=0).release()
            valkey.start()
            await eventually(lambda: one.peers.count() == other.peers.count() == 1)
            await eventually(lambda: other.totals() == {"sure": Load(1, 70)})
            assert one.peers.dropped > 0
    events = [line["event"] for line in lines]
    assert events.count("peers_lost") == events.count("peers_restored") == 2


async def test_a_server_that_freezes_is_left_in_time(valkey: Server) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS), ends(config_of(valkey)) as (one, _):
        valkey.freeze()
        await eventually(lambda: one.peers.count() == 0)
    valkey.thaw()


async def test_no_server_at_all_is_no_error(tmp_path: Path) -> None:
    end = End(Store(RedisConfig(socket=str(tmp_path / "nobody"))))
    async with end.peers:
        end.load.charge("sure", "m", hashes=CHAIN, start=0, queued_tokens=1).release()
        await asyncio.sleep(0.1)
    assert end.peers.stats.sent == 0
    end.load.charge("sure", "m", hashes=CHAIN, start=0, queued_tokens=1).release()


async def test_a_cluster_will_do(tmp_path: Path) -> None:
    with server(tmp_path, *cluster_options()) as node:
        with node.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
            await eventually(lambda: "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO")))
        with structlog.testing.capture_logs() as lines:
            async with ends(config_of(node, cluster=True)) as (one, other):
                one.load.charge("sure", "m", hashes=CHAIN, start=0, queued_tokens=70)
                await eventually(lambda: other.totals() == {"sure": Load(1, 70)})
    assert not [line for line in lines if line["event"] == "peers_failed"]


async def test_the_master_that_sentinels_tell_will_do(valkey: Server, tmp_path: Path) -> None:
    settings = tmp_path / "sentinel.conf"
    settings.write_text(f"sentinel monitor mymaster 127.0.0.1 {valkey.port} 1\n")
    sentinel = Server(folder=tmp_path / "sentinel", port=free_port(), options=(str(settings), "--sentinel"))
    try:
        sentinel.start()
        async with ends(RedisConfig(sentinels=(f"127.0.0.1:{sentinel.port}",))) as (one, other):
            one.load.charge("sure", "m", hashes=CHAIN, start=0, queued_tokens=70)
            await eventually(lambda: other.totals() == {"sure": Load(1, 70)})
    finally:
        sentinel.kill()
