"""Tests what foreign data in Redis really looks like: stamps, restarts, ranks, keys of other types, crowds of holders."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import structlog

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.redis import layout, match_script
from matrixinfer.index.redis.index import RedisIndex
from matrixinfer.index.redis.match_watch import LOOKUPS, MatchWatch
from matrixinfer.index.redis.pod_states import PodStates
from matrixinfer.index.redis.reader import MAX_NAMES, BlockReader
from matrixinfer.index.redis.store import Store
from matrixinfer.index.redis.survey import survey
from matrixinfer.index.redis.warm_start import fill
from matrixinfer.index.warm_start import WarmIndex
from tests.servers import Server
from tests.waiting import eventually

pytestmark = pytest.mark.server

DAY = 86_400.0
NOW = int(time.time())
TOKENS = list(range(500, 500 + 16 * 32))
HASHES = TokenBlockProcessor(16, "block").chain(TOKENS)[:]


@pytest.fixture(autouse=True)
def empty(valkey: Server) -> None:
    valkey.flush()


def put(valkey: Server, holders: Mapping[str, str | int], blocks: int = 4, *, model: str = "m") -> None:
    """Write entries as a writer of another project does."""
    with valkey.client() as client:
        for block in HASHES[:blocks]:
            client.hset(f"{layout.prefix_of(model)}{block}", mapping=dict(holders))


async def matched(
    valkey: Server,
    hashes: list[int] = HASHES,
    *,
    starts: Mapping[str, float] | None = None,
    endpoints: Collection[str] | None = None,
) -> dict[str, int]:
    """The answer, which is the same by script and by pipeline; about `endpoints` only, if they are given."""
    answers: list[dict[str, int]] = []
    for scripts in (True, False):
        async with Store(valkey.config(scripts=scripts)) as store:
            reader = BlockReader(
                store,
                max_age=DAY,
                clock=lambda: NOW + 0.5,
                starts=lambda: starts or {},
                endpoints=None if endpoints is None else lambda: endpoints,
            )
            found = await reader.match("m", hashes)
            answers.append({pod: count for pod, count in found.items() if endpoints is None or pod in endpoints})
    assert answers[0] == answers[1]
    return answers[0]


@pytest.mark.parametrize(
    "stamp",
    [f"{NOW}.123", f"{NOW}000", f"{NOW}000000", f"{NOW}000000000", f"000{NOW}", "", "2026-11-28T00:00:00Z", "-5"],
    ids=[
        "fraction",
        "ms",
        "µs",
        "ns",
        "zeros",
        "empty",
        "iso",
        "negative",
    ],  # not by the time, which differs per process
)
async def test_stamps_of_the_field_count(valkey: Server, stamp: str) -> None:
    put(valkey, {"a.ns": stamp})
    assert await matched(valkey) == {"a.ns": 4}
    with valkey.client() as client:
        client.hset(layout.EPOCHS, "a.ns", str(NOW - 10))  # now a writer of this project writes for the pod
    assert await matched(valkey) == ({"a.ns": 4} if str(NOW) in stamp else {})


async def test_old_stamps_in_milliseconds_do_not_count(valkey: Server) -> None:
    put(valkey, {"a.ns": (NOW - 2 * 86_400) * 1000})
    assert await matched(valkey) == {}


async def test_stamps_older_than_the_engine_do_not_count(valkey: Server) -> None:
    put(valkey, {"a.ns": NOW - 60, "b.ns.svc.cluster.local": NOW - 60, "c.ns": NOW - 60, "d.ns": NOW - 60})
    with valkey.client() as client:
        client.hset(layout.LEASES, "d.ns", str(NOW + 10))
    starts = {"a.ns": NOW - 59.5, "b.ns": NOW - 59.5, "c.ns": NOW - 61.0, "d.ns": NOW - 1.0}
    assert await matched(valkey, starts=starts) == {"c.ns": 4, "d.ns": 4}
    assert await matched(valkey, starts={"a.ns": NOW - 60.0}) == {"b.ns": 4, "c.ns": 4, "d.ns": 4}
    with valkey.client() as client:
        client.hset(layout.EPOCHS, mapping={"a.ns": "1", "b.ns": "1"})  # their writers notice restarts themselves
    assert await matched(valkey, starts={"a.ns": NOW - 60.0, "b.ns": NOW - 59.0}) == {"a.ns": 4, "c.ns": 4, "d.ns": 4}


@pytest.mark.parametrize("position", [0, 2])
async def test_a_key_of_another_type_costs_that_key_only(valkey: Server, position: int) -> None:
    put(valkey, {"a.ns": NOW})
    with valkey.client() as client:
        key = f"{layout.prefix_of('m')}{HASHES[position]}"
        client.delete(key)
        client.set(key, "x")
    with structlog.testing.capture_logs() as logs:
        assert await matched(valkey) == ({"a.ns": position} if position else {})
    assert [(entry["event"], entry["key"]) for entry in logs] == [("redis_key_unreadable", key)] * 2
    async with Store(valkey.config()) as store:
        reader = BlockReader(store, max_age=DAY)
        assert await reader.last("m", ["a.ns"], HASHES[: position + 1]) == ({"a.ns": position - 1} if position else {})
        assert reader.circuit == "closed"


async def test_a_table_of_another_type_reads_as_empty(valkey: Server) -> None:
    put(valkey, {"a.ns": NOW})
    with valkey.client() as client:
        for key in (layout.EPOCHS, layout.LEASES, layout.STATES, layout.meta_key("m")):
            client.set(key, "x")
    assert await matched(valkey) == {"a.ns": 4}
    async with Store(valkey.config()) as store:
        await PodStates(store, {"block_size": "16"}, models=lambda: ["m"]).read()
        found = await survey(store, max_age=DAY, limit=1_000)
        assert found.models["m"].pods == {"a.ns": 4}


async def test_writers_leave_out_a_key_of_another_type(valkey: Server) -> None:
    with valkey.client() as client:
        client.set(f"{layout.prefix_of('m')}{HASHES[1]}", "x")
        client.set(layout.meta_key("m"), "x")
    async with (
        Store(valkey.config()) as store,
        RedisIndex(store, TokenBlockProcessor(16, "block"), max_age=DAY) as index,
    ):
        index.add("m", "a.ns", HASHES, None)
        await index.flush()
        assert await index.match("m", HASHES) == {"a.ns": 1}
        assert await index.match("m", HASHES[2:]) == {"a.ns": len(HASHES) - 2}
        index.remove("m", "a.ns", HASHES)
        await index.flush()
        assert await index.match("m", HASHES[2:]) == {}
        assert index.writer.stats.failures == 0


CROWD = {f"pod-{n}.ns": NOW for n in range(10_000)}


async def test_a_crowd_of_holders_is_not_read_whole(valkey: Server) -> None:
    put(valkey, {**CROWD, "a.ns": NOW, "b.ns.svc.cluster.local": NOW})
    put(valkey, {"a.ns": NOW}, 8)
    with structlog.testing.capture_logs() as logs:
        assert await matched(valkey, endpoints=("a.ns", "b.ns", "c.ns")) == {"a.ns": 8, "b.ns": 4}
        async with Store(valkey.config()) as store:
            reader = BlockReader(store, max_age=DAY, endpoints=lambda: ("a.ns", "b.ns", "c.ns"))
            await reader.match("m", HASHES)
            with valkey.client() as client:
                client.execute_command("CONFIG", "SET", "slowlog-log-slower-than", "0")
                client.slowlog_reset()
                for _ in range(5):
                    assert await reader.match("m", HASHES) == {"a.ns": 8, "b.ns": 4}
                slowest = max(entry["duration"] for entry in client.slowlog_get(50))
                client.execute_command("CONFIG", "SET", "slowlog-log-slower-than", "10000")
            assert reader.stats.outcomes["answered"] == 6
    assert slowest < 5_000  # microseconds; the deadline of a lookup is 20,000
    assert [entry["event"] for entry in logs] == ["redis_lookup_capped"] * 3


async def test_a_lookup_is_capped_and_says_so(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"pod-{n}.ns" for n in range(MAX_NAMES + 1)]
    put(valkey, dict.fromkeys(names, NOW), 1)
    async with Store(valkey.config()) as store:
        reader = BlockReader(store, max_age=DAY, endpoints=lambda: names)
        assert len(await reader.match("m", HASHES)) == MAX_NAMES
        assert reader.stats.outcomes["capped"] == 1
    monkeypatch.setattr("matrixinfer.index.redis.reader.BUDGET", 10)
    put(valkey, {"a.ns": NOW, "b.ns": NOW, "c.ns": NOW}, len(HASHES))
    with valkey.client() as client:
        client.delete(f"{layout.prefix_of('m')}{HASHES[0]}")
        client.hset(f"{layout.prefix_of('m')}{HASHES[0]}", mapping={"a.ns": NOW, "b.ns": NOW})
    async with Store(valkey.config()) as store:
        reader = BlockReader(store, max_age=DAY, endpoints=lambda: ("a.ns", "b.ns"))
        found = await reader.match("m", HASHES)
        assert 1 < found["a.ns"] == found["b.ns"] < len(HASHES)
        assert reader.stats.outcomes["capped"] == 1
    assert match_script.BUDGET > 10


async def test_a_model_may_have_another_name_in_redis(valkey: Server) -> None:
    def name(model: str) -> str:
        return "booster" if model == "engine" else model

    put(valkey, {"a.ns": NOW}, model="booster")
    blocks = TokenBlockProcessor(16, "block")
    async with Store(valkey.config()) as store, RedisIndex(store, blocks, max_age=DAY, redis_name=name) as index:
        assert await index.match("engine", HASHES) == {"a.ns": 4}
        assert await index.last("engine", ["a.ns"], HASHES) == {"a.ns": 3}
        index.add("engine", "b.ns", HASHES[:3], None)
        await index.flush()
        with valkey.client() as client:
            assert client.hget(f"{layout.prefix_of('booster')}{HASHES[0]}", "b.ns")
            assert client.hget(layout.meta_key("booster"), "block_size") == "16"
            client.hset(layout.meta_key("booster"), "block_size", "64")
        states = PodStates(store, {"block_size": "16"}, models=lambda: ["engine"], redis_name=name)
        await states.read()
        assert set(states.foreign) == {"engine"}
        warm = WarmIndex(MemoryIndex(), max_blocks=100, has_own_events=lambda _: False)
        await fill(warm, store, pods=lambda: {"a.ns", "b.ns"}, max_age=DAY, own_names=lambda: {"booster": "engine"})
        assert await warm.match("engine", HASHES) == {"a.ns": 4, "b.ns": 3}


async def problems(
    valkey: Server, blocks: TokenBlockProcessor, pods: Collection[str] = ("a.ns", "b.ns"), lookups: int = LOOKUPS
) -> list[Any]:
    """What a gateway logs about lookups of one prompt, and finds in Redis when it is asked."""
    with structlog.testing.capture_logs() as logs:
        async with Store(valkey.config()) as store:
            watch = MatchWatch(store, blocks, knows=lambda name: name in pods, endpoints=lambda: pods)
            index = RedisIndex(store, blocks, max_age=DAY, watch=watch)
            async with watch:
                for _ in range(lookups):
                    await index.match("m", blocks.chain(TOKENS))
                if lookups >= LOOKUPS:
                    await eventually(lambda: bool(logs))
            found = await watch.search()
    assert [(entry["model"], entry["problem"]) for entry in logs] == [
        (problem.model, problem.message) for problem in (found if lookups >= LOOKUPS else [])
    ]
    return found


@pytest.mark.parametrize(
    ("here", "fits"),
    [
        (TokenBlockProcessor(128, "prefix"), "scheme block, size 16"),
        (TokenBlockProcessor(16, "prefix"), "scheme block, size 16"),  # the first block has the same hash in both
        (TokenBlockProcessor(64, "block"), "scheme block, size 16"),
        (TokenBlockProcessor(1024, "block"), "scheme block, size 16"),  # the prompt has no full block of that size
    ],
)
async def test_lookups_that_never_match_say_how_the_keys_hash(
    valkey: Server, here: TokenBlockProcessor, fits: str
) -> None:
    put(valkey, {"a.ns": NOW}, len(HASHES))
    (problem,) = await problems(valkey, here)
    assert problem.message == (
        f"none of {LOOKUPS} lookups of m matched any of 32 keys; keys hash like {fits}, "
        f"and here scheme {here.scheme}, size {here.block_size}"
    )
    assert problem.fix == "set `blocks: {scheme: block, size: 16}`"


RIGHT = TokenBlockProcessor(16, "block")


async def test_lookups_that_never_match_say_that_pods_or_the_model_have_other_names(valkey: Server) -> None:
    put(valkey, {"a.ns": NOW}, len(HASHES))
    (problem,) = await problems(valkey, RIGHT, pods=("a", "b"))
    assert problem.message.endswith("; the pods in Redis are named `a.ns`, and here `a`, `b`")
    valkey.flush()
    put(valkey, {"a.ns": NOW}, len(HASHES), model="booster")
    (problem,) = await problems(valkey, RIGHT)
    assert "under the model name `booster`" in problem.message
    assert "indexName: booster" in problem.fix


async def test_lookups_that_never_match_say_that_nothing_fits_or_is_there(valkey: Server) -> None:
    (problem,) = await problems(valkey, RIGHT)
    assert problem.message.endswith("any of 0 keys; Redis has no key of the model `m`")
    with valkey.client() as client:
        client.hset(f"{layout.prefix_of('m')}7", "a.ns", str(NOW))
    (problem,) = await problems(valkey, RIGHT, lookups=1)
    assert problem.message == (
        "none of 1 lookups of m matched any of 1 keys; no scheme and block size that were tried fit the keys"
    )


async def test_new_prompts_are_no_problem_if_their_blocks_appear_as_expected(valkey: Server) -> None:
    blocks = RIGHT
    async with Store(valkey.config()) as store:
        watch = MatchWatch(store, blocks, knows=lambda name: name == "a.ns", endpoints=lambda: ["a.ns"])
        index = RedisIndex(store, blocks, max_age=DAY, watch=watch)
        for _ in range(LOOKUPS):
            await index.match("m", blocks.chain(TOKENS))
        put(valkey, {"a.ns": NOW}, len(HASHES))  # the engine has computed the prompt by now
        assert await watch.search() == []
        assert await index.match("m", blocks.chain(TOKENS)) == {"a.ns": 32}
        await index.match("m", blocks.chain(TOKENS, salt="secret"))  # such a prompt must not match
        assert await watch.search() == []


async def test_a_search_without_permission_to_scan_still_tries_keys(valkey: Server) -> None:
    put(valkey, {"a.ns": NOW}, len(HASHES))
    with valkey.client() as client:
        client.acl_setuser(
            "looks", enabled=True, nopass=True, keys=["matrix:kv:*", "{matrix:kv}:*"], commands=["+ping", "+hgetall"]
        )
    async with Store(valkey.config(username="looks", password="any")) as store:
        here = TokenBlockProcessor(128, "prefix")
        watch = MatchWatch(store, here, knows=lambda name: True, endpoints=lambda: ["a.ns"])
        index = RedisIndex(store, here, max_age=DAY, watch=watch)
        await index.match("m", here.chain(TOKENS))
        (problem,) = await watch.search()
        assert "matched any key; keys hash like scheme block, size 16" in problem.message
    async with Store(valkey.config(username="looks", password="any", host="127.0.0.1", port=1)) as store:
        with pytest.raises(IndexUnavailable):
            await store.table("x")
