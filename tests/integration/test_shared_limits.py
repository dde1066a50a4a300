"""Limits that several gateways count together, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from matrixinfer.access import limits as limits_module
from matrixinfer.access import shared as shared_module
from matrixinfer.access.callers import Caller
from matrixinfer.access.limits import Limits, Reservation
from matrixinfer.access.quota import NOTHING, Amounts
from matrixinfer.access.shared import SharedLedger
from matrixinfer.config.access import QuotaConfig
from matrixinfer.errors import LimitExceeded
from matrixinfer.index.redis.store import Store
from tests import servers
from tests.integration.access_support import Engine, key_file
from tests.integration.access_support import gateway as served
from tests.ports import free_port
from tests.waiting import DEADLINE_SECONDS, eventually

pytestmark = pytest.mark.server
HOUR = 3600.0


def caller(name: str = "a", **quota: int) -> Caller:
    return Caller(name=name, tenant=name, account=f"key:{name}", quota=QuotaConfig(window_seconds=HOUR, **quota))


@asynccontextmanager
async def gateway(server: servers.Server) -> AsyncIterator[Limits]:
    async with (
        Store(server.config()) as store,
        Limits(SharedLedger(store), deadline_seconds=DEADLINE_SECONDS) as limits,
    ):
        yield limits


async def tries(limits: Limits, who: Caller, amounts: Amounts, count: int) -> list[Reservation]:
    """What of so many requests at the same time was let through."""
    answers = await asyncio.gather(*(limits.reserve(who, amounts) for _ in range(count)), return_exceptions=True)
    assert {type(each) for each in answers} <= {Reservation, LimitExceeded}
    return [each for each in answers if isinstance(each, Reservation)]


async def test_many_requests_at_once_at_several_gateways_never_exceed_a_limit(valkey: servers.Server) -> None:
    valkey.flush()
    async with gateway(valkey) as one, gateway(valkey) as other:
        who = caller(requests=50)
        let_through = await asyncio.gather(*(tries(each, who, Amounts(1), 100) for each in (one, other)))
        assert sum(map(len, let_through)) == 50
        who = caller("b", input_tokens=1000)
        let_through = await asyncio.gather(*(tries(each, who, Amounts(1, 30), 100) for each in (one, other)))
        assert sum(map(len, let_through)) == 33
        who = caller("c", concurrent_requests=7)
        let_through = await asyncio.gather(*(tries(each, who, Amounts(1), 100) for each in (one, other)))
        assert sum(map(len, let_through)) == 7


async def test_what_one_gateway_settles_the_other_may_use(valkey: servers.Server) -> None:
    valkey.flush()
    who = caller(concurrent_requests=1, input_tokens=100, uncached_tokens=50)
    async with gateway(valkey) as one, gateway(valkey) as other:
        taken = await one.reserve(who, Amounts(1, 80, 0, 50))
        assert taken is not None
        assert taken.headers["x-ratelimit-remaining-input-tokens"] == "20"
        with pytest.raises(LimitExceeded):
            await other.reserve(who, Amounts(1, 1))
        one.settle(taken, Amounts(1, 60, 0, 10))

        async def is_free() -> bool:
            return len(await tries(other, who, Amounts(1, 40, 0, 40), 1)) == 1

        await eventually(is_free)
        with pytest.raises(LimitExceeded):
            await other.reserve(who, Amounts(1, 1))


async def test_what_is_given_back_never_makes_more_than_the_limit(valkey: servers.Server) -> None:
    valkey.flush()
    who = caller(input_tokens=100)
    async with gateway(valkey) as limits:
        for taken in await tries(limits, who, Amounts(1, 10), 10):
            limits.settle(taken, NOTHING)
        await eventually(lambda: not limits.unsettled)
        assert len(await tries(limits, who, Amounts(1, 10), 20)) == 10


async def test_clients_that_leave_before_redis_answers_take_nothing(valkey: servers.Server) -> None:
    valkey.flush()
    who = caller(requests=20, concurrent_requests=20)
    async with gateway(valkey) as limits:
        assert len(await tries(limits, caller("b", requests=1), Amounts(1), 1)) == 1  # it is connected
        valkey.freeze()
        leaving = [asyncio.create_task(limits.reserve(who, Amounts(1))) for _ in range(20)]
        await asyncio.sleep(0.1)  # their commands are sent
        for each in leaving:
            each.cancel()
        await asyncio.wait(leaving)
        valkey.thaw()
        assert all(each.cancelled() for each in leaving)

        async def is_all_there() -> bool:
            taken = await tries(limits, who, Amounts(1), 20)
            for each in taken:
                limits.settle(each, NOTHING)
            await eventually(lambda: not limits.unsettled)
            return len(taken) == 20

        await eventually(is_all_there, pause=0.1)


async def test_what_redis_reserves_too_late_is_given_back(valkey: servers.Server) -> None:
    valkey.flush()
    who = caller(requests=1)
    async with Store(valkey.config()) as store, Limits(SharedLedger(store), deadline_seconds=0.02) as limits:
        assert len(await tries(limits, caller("b", requests=1), Amounts(1), 1)) == 1
        valkey.freeze()
        try:
            alone = await limits.reserve(who, Amounts(1))
        finally:
            valkey.thaw()
        assert alone is not None
        assert not alone.is_shared

        async def is_free() -> bool:
            return any(each.is_shared for each in await tries(limits, who, Amounts(1), 1))

        await eventually(is_free, pause=0.1)


async def test_what_redis_refuses_to_settle_keeps_nobody_elses_place(valkey: servers.Server) -> None:
    valkey.flush()
    bad, good = caller("bad", concurrent_requests=1, input_tokens=10), caller("good", concurrent_requests=1)
    async with gateway(valkey) as limits:
        (first,), (second,) = [await tries(limits, each, Amounts(1, 1), 1) for each in (bad, good)]
        limits.settle(first, Amounts(1, 2**63))  # more than Redis can add
        limits.settle(second, Amounts(1))

        async def is_free() -> bool:
            return len(await tries(limits, good, Amounts(1), 1)) == 1

        await eventually(is_free, pause=0.1)
        await eventually(lambda: not limits.unsettled)


async def test_what_a_replica_does_not_take_is_settled_when_it_takes_writes_again(
    valkey: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey.flush()
    monkeypatch.setattr(limits_module, "RETRY_SECONDS", 0.01)
    who = caller(concurrent_requests=1)
    async with gateway(valkey) as limits:
        (taken,) = await tries(limits, who, Amounts(1), 1)
        with valkey.client() as client:
            client.replicaof("127.0.0.1", free_port())
            try:
                limits.settle(taken, NOTHING)
                await asyncio.sleep(0.5)  # long enough for many refusals
                assert limits.unsettled == 1
            finally:
                client.replicaof("no", "one")
        await eventually(lambda: not limits.unsettled)
        assert len(await tries(limits, who, Amounts(1), 1)) == 1


async def test_a_gateway_that_ends_settles_what_has_ended(valkey: servers.Server) -> None:
    valkey.flush()
    who = caller(requests=1)
    async with gateway(valkey) as one:
        taken = await one.reserve(who, Amounts(1))
        assert taken is not None
        one.settle(taken, NOTHING)
    async with gateway(valkey) as other:
        assert await other.reserve(who, Amounts(1)) is not None


async def test_requests_of_a_gateway_that_dies_end_with_their_lease(
    valkey: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey.flush()
    monkeypatch.setattr(shared_module, "LEASE_SECONDS", 5)
    monkeypatch.setattr(limits_module, "RENEW_SECONDS", 0.1)
    who = caller(concurrent_requests=1)
    async with gateway(valkey) as survivor:
        async with gateway(valkey) as dying:
            assert await dying.reserve(who, Amounts(1)) is not None
            await asyncio.sleep(6)  # longer than the lease, which is renewed
            assert await tries(survivor, who, Amounts(1), 1) == []

        async def is_free() -> bool:
            return len(await tries(survivor, who, Amounts(1), 1)) == 1

        await eventually(is_free, pause=0.1)


async def test_a_lost_server_leaves_each_gateway_its_own_count(tmp_path: Path) -> None:
    with servers.server(tmp_path) as server:
        told: list[bool] = []
        config = server.config(deadline_seconds=DEADLINE_SECONDS)
        async with (
            Store(config) as store,
            Limits(SharedLedger(store), deadline_seconds=DEADLINE_SECONDS, on_degraded=told.append) as limits,
        ):
            who = caller(requests=3)
            first = await tries(limits, who, Amounts(1), 2)
            server.kill()
            assert len(await tries(limits, who, Amounts(1), 10)) == 3
            assert (limits.is_degraded, told) == (True, [True])
            for each in first:
                limits.settle(each, NOTHING)
            server.start()

            async def is_shared() -> bool:
                found = await tries(limits, caller("b", requests=1000), Amounts(1), 1)
                return found[0].is_shared

            await eventually(is_shared, pause=0.1)
            assert (limits.is_degraded, told) == (False, [True, False])
            await eventually(lambda: not limits.unsettled)


async def test_what_redis_holds_names_nobody_and_ends_by_itself(valkey: servers.Server) -> None:
    valkey.flush()
    async with gateway(valkey) as limits:
        await limits.reserve(caller("alice", requests=5), Amounts(1, 2, 3, 4))
        with valkey.client() as client:
            keys = client.keys("*")
            assert isinstance(keys, list)
            assert len(keys) == 2
            assert not any("alice" in key for key in keys)
            assert all(0 < int(str(client.ttl(key))) <= 2 * HOUR + 2 for key in keys)


async def test_two_gateways_with_many_clients_let_through_what_the_limit_says(
    valkey: servers.Server, tmp_path: Path
) -> None:
    valkey.flush()
    key_file(tmp_path, [{"name": "a", "key": "sk-a"}])
    text = (
        "access: {keysFile: keys.yaml, countIn: redis, limits: {requests: 20, windowSeconds: 3600}}\n"
        f"redis: {{host: 127.0.0.1, port: {valkey.port}}}\n"  # with the deadline of lookups by default
    )
    engines = Engine(), Engine()
    async with (
        served(text, engines[0], base=tmp_path) as one,
        served(text, engines[1], base=tmp_path) as other,
    ):
        answers = await asyncio.gather(*(each.post("sk-a") for each in (one, other) for _ in range(50)))
        statuses = [answer.status for answer in answers]
        assert (statuses.count(200), statuses.count(429)) == (20, 80)
        assert sum(len(engine.bodies) for engine in engines) == 20
        assert await one.metric("matrixinfer_limits_degraded") == 0
