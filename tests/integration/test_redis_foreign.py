"""Tests the exchange with writers of other projects, which a plain client imitates, by script and by pipeline."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncIterator

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.redis import layout
from matrixinfer.index.redis.index import RedisIndex
from matrixinfer.index.redis.reader import CHUNK, LAST_CHUNK, BlockReader
from matrixinfer.index.redis.store import Store
from tests.servers import Server

pytestmark = pytest.mark.server

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
NOW, MAX_AGE = 1_703_200_000, 86_400
SUFFIX = ".svc.cluster.local"

PODS = [*(f"pod-name-{n}.ns" for n in range(3)), "pod-name-0.ns~ends"]
PODS_AT_THE_END = ("pod-0.ns", "pod-5.ns", "pod-10.ns")
names = st.sampled_from([spelling for pod in PODS for spelling in (pod, pod + SUFFIX)] + [b"\xff\xfe", "pod\u2028"])
garbage = st.sampled_from(
    [
        "",
        "soon",
        "-5",
        "+9999999999",
        " 1703199999",
        "1703199999.5",
        "17e8",
        "0x7fffffff",
        "inf",
        "nan",
        "1_703_199_999",
        "9" * 30,
        b"\xff",
        "2023-12-21T10:00:00Z",
        "٣",
    ]
)
at_edges = st.one_of(
    st.integers(NOW - MAX_AGE - 1, NOW - MAX_AGE + 1), st.integers(NOW - 2, NOW + 3), st.just(0), st.just(10**18)
)
stamps = st.one_of(at_edges.map(str), at_edges.map(str), at_edges.map(str), garbage)
entries = st.dictionaries(names, stamps, max_size=8)
tables = st.dictionaries(names, stamps, max_size=6)


def chain(count: int) -> list[int]:
    """Hashes of 64 bits, as in projects that keep the top bit."""
    return [int.from_bytes(hashlib.sha256(str(n).encode()).digest()[:8], "big") for n in range(count)]


def fill(
    server: Server, blocks: list[dict[str | bytes, str | bytes]], **tables: dict[str | bytes, str | bytes]
) -> None:
    with redis.Redis(port=server.port) as client, client.pipeline() as pipeline:
        pipeline.flushall()
        for block, fields in zip(chain(len(blocks)), blocks, strict=True):
            if fields:
                pipeline.hset(f"matrix:kv:block:{MODEL}@{block}", mapping=fields)
        for name, fields in tables.items():
            if fields:
                pipeline.hset(f"{{matrix:kv}}:{name}", mapping=fields)
        pipeline.execute()


async def both_ways(server: Server, hashes: list[int], *, now: float = NOW, max_age: float = MAX_AGE) -> dict[str, int]:
    """The answer, which must be the same by script and by pipeline."""
    answers = []
    for scripts in (True, False):
        async with Store(server.config(scripts=scripts)) as store:
            reader = BlockReader(store, max_age=max_age, clock=lambda: now)
            answers.append(await reader.match(MODEL, hashes))
            assert reader._scripted is scripts  # noqa: SLF001 - no other sign shows which way was taken
    assert answers[0] == answers[1]
    return answers[0]


async def last_both_ways(
    server: Server, pods: list[str], hashes: list[int], *, now: float = NOW, max_age: float = MAX_AGE
) -> dict[str, int]:
    """The answer of `last`, which must be the same by script and by pipeline."""
    answers = []
    for scripts in (True, False):
        async with Store(server.config(scripts=scripts)) as store:
            reader = BlockReader(store, max_age=max_age, clock=lambda: now)
            answers.append(await reader.last(MODEL, pods, hashes))
    assert answers[0] == answers[1]
    return answers[0]


@settings(max_examples=120)
@given(
    blocks=st.lists(entries, max_size=6),
    epochs=tables,
    leases=tables,
    now=st.sampled_from([NOW, NOW + 0.7, 0.0]),
    max_age=st.sampled_from([MAX_AGE, 0.5, 1e12]),
)
async def test_script_and_pipeline_give_the_same_answer(
    valkey: Server,
    blocks: list[dict[str | bytes, str | bytes]],
    epochs: dict[str | bytes, str | bytes],
    leases: dict[str | bytes, str | bytes],
    now: float,
    max_age: float,
) -> None:
    fill(valkey, blocks, epochs=epochs, leases=leases)
    await both_ways(valkey, chain(len(blocks)), now=now, max_age=max_age)
    await last_both_ways(valkey, [*PODS[1:], "pod\u2028", "absent"], chain(len(blocks)), now=now, max_age=max_age)


@settings(max_examples=5)
@given(spread=st.lists(st.integers(0, 3), min_size=3, max_size=3), seed=st.integers(1, 100))
async def test_script_and_pipeline_agree_with_thousands_of_pods(valkey: Server, spread: list[int], seed: int) -> None:
    blocks: list[dict[str | bytes, str | bytes]] = [
        {
            f"pod-{n}.ns{SUFFIX if (n * seed + skew) % 3 == 0 else ''}": str(NOW - n * 40)
            for n in range(4_500)
            if (n * seed) % (position + 2) >= min(skew, position)
        }
        for position, skew in enumerate(spread)
    ]
    epochs: dict[str | bytes, str | bytes] = {f"pod-{n}.ns": str(NOW - 3_000) for n in range(0, 4_500, 7)}
    leases: dict[str | bytes, str | bytes] = {f"pod-{n}.ns": str(NOW + 5) for n in range(0, 4_500, 5)}
    fill(valkey, blocks, epochs=epochs, leases=leases)
    found = await both_ways(valkey, chain(3))
    assert 1_000 < len(found) < 4_500
    assert set(await last_both_ways(valkey, list(found), chain(3))) == set(found)
    few = {pod: 2 for pod in PODS_AT_THE_END if pod in blocks[2] or pod + SUFFIX in blocks[2]}
    assert (await last_both_ways(valkey, list(PODS_AT_THE_END), chain(3))).items() >= few.items()


async def test_both_spellings_of_a_pod_are_one_pod(valkey: Server) -> None:
    fill(valkey, [{f"pod-a.ns{SUFFIX if n % 2 else ''}": str(NOW)} for n in range(9)])
    assert await both_ways(valkey, chain(9)) == {"pod-a.ns": 9}


@pytest.mark.parametrize("others", [0, 40])  # so many that the pod is looked up by name
async def test_a_stamp_that_can_be_read_decides_over_one_that_cannot(valkey: Server, others: int) -> None:
    more: dict[str | bytes, str | bytes] = {f"pod-{n}.ns": str(NOW - MAX_AGE - 1) for n in range(others)}
    old: dict[str | bytes, str | bytes] = {f"pod-a.ns{SUFFIX}": str(NOW - MAX_AGE - 1)}
    fill(valkey, [{"pod-a.ns": "soon", **more}, {"pod-a.ns": "soon", **more}, {"pod-a.ns": "soon", **old, **more}])
    assert await both_ways(valkey, chain(3)) == {"pod-a.ns": 2}


async def test_the_last_blocks_over_several_round_trips(valkey: Server) -> None:
    count = LAST_CHUNK + 10
    held = {"pod-a.ns": 3, f"pod-b.ns{SUFFIX}": LAST_CHUNK, "pod-c.ns~ends": count - 1, "pod-d.ns~ends": 9}
    fill(
        valkey,
        [{pod: str(NOW) for pod, last in held.items() if n in (1, last // 2, last)} for n in range(count)],
    )
    expected = {layout.canonical(pod): last for pod, last in held.items()}
    assert await last_both_ways(valkey, [*expected, "pod-e.ns"], chain(count)) == expected


async def test_a_chain_over_several_round_trips(valkey: Server) -> None:
    held = {"pod-a.ns": 2 * CHUNK + 1, "pod-b.ns": 2 * CHUNK, "pod-c.ns": CHUNK, "pod-d.ns": CHUNK - 1, "pod-e.ns": 1}
    held["pod-f.ns"] = 3 * CHUNK
    fill(valkey, [{pod: str(NOW) for pod, count in held.items() if n < count} for n in range(3 * CHUNK)])
    assert await both_ways(valkey, chain(3 * CHUNK)) == held


def old_hash(tokens: list[int]) -> int:
    """The documented hash of a separate block: SHA-256 of the tokens, 4 bytes each, big-endian."""
    digest = hashlib.sha256(b"".join(struct.pack(">I", token) for token in tokens)).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)


TOKENS = list(range(1000, 1000 + 5 * 128))
BLOCKS = TokenBlockProcessor(128, "block")
OLD_KEYS = [f"matrix:kv:block:{MODEL}@{old_hash(TOKENS[at : at + 128])}" for at in range(0, 5 * 128, 128)]


@pytest.fixture
async def index(valkey: Server) -> AsyncIterator[RedisIndex]:
    valkey.flush()
    async with (
        Store(valkey.config()) as store,
        RedisIndex(store, BLOCKS, max_age=MAX_AGE, clock=lambda: NOW + 0.9) as index,
    ):
        yield index


async def test_blocks_of_existing_writers_are_read(valkey: Server, index: RedisIndex) -> None:
    with valkey.client() as client:
        for n, key in enumerate(OLD_KEYS):
            client.hset(key, "pod-name-1.namespace.svc.cluster.local", str(NOW - 60))
            if n != 2:
                client.hset(key, "pod-name-2.namespace", str(NOW - 30))
            client.hset(key, "pod-name-3.namespace.svc.cluster.local", str(NOW - MAX_AGE - 1))
    expected = {"pod-name-1.namespace": 5, "pod-name-2.namespace": 2}
    assert await index.match(MODEL, BLOCKS.chain(TOKENS)) == expected
    assert await index.match(MODEL, BLOCKS.chain(TOKENS, salt="secret")) == {}


async def test_written_blocks_have_the_documented_layout(valkey: Server, index: RedisIndex) -> None:
    index.add(MODEL, "pod-name-1.namespace", BLOCKS.chain(TOKENS)[:], None)
    index.remove(MODEL, "pod-name-1.namespace", BLOCKS.chain(TOKENS)[4:])
    await index.flush()
    with valkey.client() as client:
        for key in OLD_KEYS[:4]:
            assert set(client.hgetall(key)) == {"pod-name-1.namespace"}
            stamp = client.hget(key, "pod-name-1.namespace")
            assert str(stamp).isdecimal()
            assert NOW <= int(str(stamp)) <= NOW + 5
        assert not client.exists(OLD_KEYS[4])
        scheme = {"block_size": "128", "hash_scheme": "block", "version": "1"}
        assert client.hgetall(layout.meta_key(MODEL)) == scheme
        assert set(client.scan_iter("matrix:kv:block:*")) == set(OLD_KEYS[:4])


async def test_pods_of_other_writers_stay_unchanged(valkey: Server, index: RedisIndex) -> None:
    theirs = "pod-name-2.namespace.svc.cluster.local"
    with valkey.client() as client:
        client.hset(OLD_KEYS[0], theirs, str(NOW - 60))
        index.add(MODEL, "pod-name-1.namespace", BLOCKS.chain(TOKENS)[:], None)
        await index.flush()
        index.clear("pod-name-1.namespace")
        await index.flush()
        assert client.hget(OLD_KEYS[0], theirs) == str(NOW - 60)
    assert await index.match(MODEL, BLOCKS.chain(TOKENS)) == {"pod-name-2.namespace": 1}
