from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from matrixinfer.access.admission import Admission, Pass, Rate
from matrixinfer.access.fair_queue import Standing
from matrixinfer.config.admission import AdmissionConfig
from matrixinfer.errors import Overloaded

pytestmark = pytest.mark.virtual_time


class Watch:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.now = (0, 0)
        self.waits: list[float] = []
        self.reasons: Counter[str] = Counter()

    def admission(self, running: int, waiting: int) -> None:
        self.now = running, waiting

    def admitted(self, seconds: float) -> None:
        self.waits.append(seconds)

    def shed(self, reason: str) -> None:
        self.reasons[reason] += 1


class Door:
    """Admission before engines that take `seconds` for each request."""

    def __init__(self, places: int, standings: Mapping[str, Standing] | None = None, **config: Any) -> None:
        self.watch = Watch()
        loop = asyncio.get_running_loop()
        self.admission = Admission(
            AdmissionConfig(max_concurrent_requests=places, **config), standings or {}, self.watch, loop.time
        )

    async def request(self, tenant: str = "", cost: int = 100, seconds: float = 1.0) -> float:
        """How long one takes."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        place = await self.admission.enter(tenant, cost)
        try:
            await asyncio.sleep(seconds)
        finally:
            place.leave(cost)
        return loop.time() - began


async def test_no_more_than_the_places_are_taken_and_all_have_their_turn() -> None:
    door = Door(3)
    taken = await asyncio.gather(*(door.request() for _ in range(10)))
    assert sorted(taken) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert door.watch.now == (0, 0)
    assert sorted(door.watch.waits) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


async def test_who_waits_too_long_is_told_and_frees_its_place_in_the_queue() -> None:
    door = Door(1, queue_timeout_seconds=2.5)
    answers = await asyncio.gather(*(door.request() for _ in range(6)), return_exceptions=True)
    assert [type(each) for each in answers] == [float, float, float, Overloaded, Overloaded, Overloaded]
    assert door.watch.reasons == {"timeout": 3}
    assert door.watch.now == (0, 0)
    assert await door.request() == 1.0


async def test_a_full_queue_sheds_at_once() -> None:
    door = Door(1, queue_size=2)
    answers = await asyncio.gather(*(door.request() for _ in range(5)), return_exceptions=True)
    assert [type(each) for each in answers] == [float, float, float, Overloaded, Overloaded]
    assert door.watch.reasons == {"full": 2}


async def test_who_must_go_for_another_tenant_is_told() -> None:
    door = Door(1, queue_size=2)
    flood = [asyncio.create_task(door.request("flood")) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert await door.request("small") < 3
    answers = await asyncio.gather(*flood, return_exceptions=True)
    assert [type(each) for each in answers] == [float, float, Overloaded]
    assert door.watch.reasons == {"displaced": 1}


@pytest.mark.parametrize("when", [0.5, 1.0])
async def test_a_client_that_goes_away_leaves_no_place_taken(when: float) -> None:
    """Also just when it gets its turn."""
    door = Door(1)
    tasks = [asyncio.create_task(door.request()) for _ in range(4)]
    await asyncio.sleep(when)
    for task in tasks[1:3]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in answers] == [False, True, True, False]
    assert door.watch.now == (0, 0)
    assert await door.request() == 1.0


async def test_a_turn_that_comes_while_its_client_leaves_goes_to_the_next() -> None:
    door = Door(1)
    place = await door.admission.enter("", 1)
    leaving = asyncio.create_task(door.admission.enter("", 1))
    staying = asyncio.create_task(door.admission.enter("", 1))
    await asyncio.sleep(0)
    place.leave(None)
    leaving.cancel()
    assert isinstance(await staying, Pass)
    assert door.watch.now == (1, 0)


async def test_requests_that_would_wait_too_long_are_shed_early_and_it_recovers_by_itself() -> None:
    door = Door(2, queue_size=10_000, queue_timeout_seconds=5.0)
    loop = asyncio.get_running_loop()
    ends: list[tuple[float, str]] = []
    pauses: list[float] = []

    async def client() -> None:
        try:
            await door.request(seconds=0.5)
            ends.append((loop.time(), "served"))
        except Overloaded as error:
            pauses.append(error.retry_after or 1.0)
            ends.append((loop.time(), "shed"))

    async with asyncio.TaskGroup() as group:
        for _ in range(60 * 20):  # five times what two places serve, for a minute
            group.create_task(client())
            await asyncio.sleep(0.05)
    assert door.watch.reasons["late"] > 500
    assert door.watch.reasons["timeout"] < 150  # those that came before it was known how fast they are served
    assert all(1.0 <= seconds <= 5.0 for seconds in pauses)
    served = [at for at, how in ends if how == "served"]
    assert len([at for at in served if 20 < at < 60]) >= 155  # nothing is lost by it: four a second
    assert await door.request(seconds=0.5) == 0.5
    assert door.watch.now == (0, 0)


async def test_weights_decide_who_is_served_under_overload() -> None:
    door = Door(4, {"large": Standing(3.0)}, queue_size=10_000, queue_timeout_seconds=10_000.0)
    tokens: Counter[str] = Counter()
    rng = random.Random(1)

    async def client(tenant: str, most: int) -> None:
        while True:
            cost = rng.randint(1, most)
            await door.request(tenant, cost, seconds=cost / 1000)
            tokens[tenant] += cost

    tasks = [asyncio.create_task(client("large", 500)) for _ in range(20)]
    tasks += [asyncio.create_task(client("small", 2000)) for _ in range(20)]
    await asyncio.sleep(600)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert abs(tokens["large"] / tokens.total() - 0.75) < 0.75 * 0.05


async def test_a_tenant_that_floods_does_not_move_the_other_s_p90_by_more_than_a_tenth() -> None:
    async def p90(*, flooded: bool) -> float:
        door, rng = Door(20, queue_timeout_seconds=600.0), random.Random(2)

        async def flood() -> None:
            while True:
                await door.request("flood", rng.randint(50, 500), rng.uniform(0.2, 2.0))

        flooding = [asyncio.create_task(flood()) for _ in range(300 if flooded else 0)]
        await asyncio.sleep(10)
        taken: list[asyncio.Task[float]] = []
        for _ in range(2000):
            await asyncio.sleep(rng.expovariate(5.0))
            taken.append(asyncio.create_task(door.request("quiet", rng.randint(50, 500), rng.uniform(0.5, 1.5))))
        seconds = sorted(await asyncio.gather(*taken))
        for task in flooding:
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
        return seconds[int(len(seconds) * 0.9)]

    alone = await p90(flooded=False)
    assert await p90(flooded=True) <= alone * 1.1


def test_the_rate_is_known_only_while_requests_wait() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    rate.add(1000)
    assert rate.per_second() is None
    rate.waiting(True)
    for _ in range(50):
        now += 1.0
        rate.add(100)
    assert rate.per_second() == pytest.approx(100, rel=0.1)
    now += 30.0  # nothing moves any more
    found = rate.per_second()
    assert found is not None
    assert found < 10
    rate.waiting(False)
    assert rate.per_second() is None
