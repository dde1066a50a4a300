"""Tests that lookups which search find what lookups of every block find, wherever an entry proves those before it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from matrixinfer.index.redis import layout
from matrixinfer.index.redis.reader import CHUNK, BlockReader
from matrixinfer.index.redis.store import Store
from tests.servers import Server

pytestmark = pytest.mark.server

NOW, MAX_AGE, EPOCH = 1_703_200_000, 86_400, 1_703_190_000
SUFFIX = layout.SUFFIX


def chain(count: int) -> list[int]:
    """Hashes of 1 to 64 bits."""
    digests = (hashlib.sha256(str(n).encode()).digest() for n in range(count))
    return [int.from_bytes(digest[:8], "big") >> (n % 3 * 20) for n, digest in enumerate(digests)]


@dataclass(frozen=True)
class Pod:
    """What Redis has of one pod: blocks up to `held` that count, and beyond them blocks from before its last clear."""

    held: int
    before: int = 0
    is_alive: bool = True
    suffixed: frozenset[int] = frozenset()
    """Blocks that are stored under the name's other spelling, too, as another writer would; with an older stamp if even."""
    holes: frozenset[int] = frozenset()

    def stamps(self, name: str, block: int) -> dict[str, str]:
        found: dict[str, str] = {}
        if block < self.held and block not in self.holes:
            found[name] = str(EPOCH + block)
        elif block < self.before:
            found[name] = str(EPOCH - 1 - block % 2)
        if found and block in self.suffixed:
            found[name + SUFFIX] = found[name] if block % 2 else str(EPOCH - 5)
        return found


def fill(server: Server, pods: Mapping[str, Pod], blocks: int) -> None:
    with redis.Redis(port=server.port) as client, client.pipeline() as pipeline:
        pipeline.flushall()
        for number, block in enumerate(chain(blocks)):
            entries = {name: at for pod, each in pods.items() for name, at in each.stamps(pod, number).items()}
            if entries:
                pipeline.hset(f"{layout.prefix_of('m')}{block}", mapping=entries)
        pipeline.hset(layout.EPOCHS, mapping=dict.fromkeys(pods, str(EPOCH)))
        pipeline.hset(layout.LEASES, mapping={pod: str(NOW + 15 * each.is_alive - 5) for pod, each in pods.items()})
        pipeline.execute()


async def matched(
    server: Server,
    hashes: Sequence[int],
    *,
    prefix_closed: bool,
    endpoints: Sequence[str] | None = None,
    scripts: bool = True,
) -> dict[str, int]:
    async with Store(server.config(scripts=scripts)) as store:
        reader = BlockReader(
            store,
            max_age=MAX_AGE,
            prefix_closed=prefix_closed,
            clock=lambda: NOW + 0.5,
            endpoints=None if endpoints is None else lambda: endpoints,
        )
        return await reader.match("m", hashes)


numbers = st.integers(0, 12)
places = st.frozensets(numbers, max_size=4)
alive = st.builds(Pod, held=numbers, before=numbers, suffixed=places)
gone = st.builds(Pod, held=numbers, before=numbers, is_alive=st.just(False), suffixed=places, holes=places)
fleets = st.lists(st.one_of(alive, alive, gone), max_size=8).map(
    lambda pods: {f"p{n}.ns": p for n, p in enumerate(pods)}
)


@settings(max_examples=120, deadline=None)
@given(pods=fleets, asked=st.integers(1, 14))
async def test_a_search_finds_what_looking_at_every_block_finds(
    valkey: Server, pods: Mapping[str, Pod], asked: int
) -> None:
    fill(valkey, {**pods, "p0.ns~ends": Pod(held=12)}, 12)
    found = await matched(valkey, chain(asked), prefix_closed=True)
    assert found == await matched(valkey, chain(asked), prefix_closed=False)
    assert found == await matched(valkey, chain(asked), prefix_closed=True, scripts=False)


async def test_a_search_among_many_pods_and_blocks(valkey: Server) -> None:
    pods = {f"pod-{n}.ns": Pod(held=n * n % 701, is_alive=n % 7 > 0, before=n * 11) for n in range(1, 60)}
    fill(valkey, pods, 701)
    found = await matched(valkey, chain(701), prefix_closed=True)
    assert found == {name: pod.held for name, pod in pods.items() if pod.held}
    assert max(found.values()) > CHUNK


async def test_a_search_by_name(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pods = {f"pod-{n}.ns": Pod(held=n, suffixed=frozenset({3, 4})) for n in range(1, 30)}
    fill(valkey, pods, 30)
    monkeypatch.setattr("matrixinfer.index.redis.reader.MOST_HOLDERS", 20)
    names = [f"pod-{n}.ns" for n in range(0, 40, 3)]
    found = await matched(valkey, chain(30), prefix_closed=True, endpoints=names)
    assert found == {name: pods[name].held for name in names if name in pods}


async def test_a_search_beyond_its_budget_claims_less_and_never_more(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods = {f"pod-{n}.ns": Pod(held=3 * n) for n in range(1, 30)}
    fill(valkey, pods, 87)
    monkeypatch.setattr("matrixinfer.index.redis.reader.BUDGET", 40)
    found = await matched(valkey, chain(87), prefix_closed=True, endpoints=list(pods))
    assert found.keys() == pods.keys()
    assert all(0 < count <= pods[name].held for name, count in found.items())
    assert found != {name: pod.held for name, pod in pods.items()}


async def test_few_blocks_are_read(valkey: Server) -> None:
    """The very purpose: bisection reads the logarithm of the blocks, for each length that pods hold."""
    fill(valkey, {f"pod-{n}.ns": Pod(held=300 if n else 400) for n in range(8)}, 500)
    with valkey.client() as client:
        reads = {}
        for prefix_closed in (True, False):
            client.execute_command("CONFIG", "RESETSTAT")
            assert len(await matched(valkey, chain(500), prefix_closed=prefix_closed)) == 8
            reads[prefix_closed] = sum(
                stats["calls"]
                for name, stats in client.info("commandstats").items()
                if name[8:] in ("hgetall", "hmget")
            )
    assert reads[True] <= 2 + 4 * 9
    assert reads[False] >= 400


async def test_a_lost_key_hides_nothing_that_a_later_entry_proves(valkey: Server) -> None:
    """Where the server evicts keys, the blocks are still in the engine, as long as the pod's writer removed none of them."""
    for lost in range(1, 9):
        fill(valkey, {"pod-a.ns": Pod(held=8), "pod-b.ns": Pod(held=3)}, 9)
        with valkey.client() as client:
            client.delete(f"{layout.prefix_of('m')}{chain(9)[lost]}")
        found = await matched(valkey, chain(9), prefix_closed=True)
        walked = await matched(valkey, chain(9), prefix_closed=False)
        assert walked["pod-a.ns"] <= found["pod-a.ns"] <= 8
        assert walked["pod-b.ns"] <= found["pod-b.ns"] <= 3
