from __future__ import annotations

import random
from collections import Counter, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from matrixinfer.access.fair_queue import Entry, FairQueue, Standing

EVERYBODY = 10**9
costs = st.integers(1, 5000)


def queue_of(size: int = EVERYBODY, **standings: Standing) -> FairQueue[int]:
    return FairQueue(size, lambda tenant: standings.get(tenant, Standing()))


def served(queue: FairQueue[int], count: int = EVERYBODY) -> list[Entry[int]]:
    found: list[Entry[int]] = []
    while len(found) < count and (entry := queue.pop()) is not None:
        found.append(entry)
    return found


@settings(max_examples=30)
@given(st.floats(0.2, 10.0), st.floats(0.2, 10.0), st.integers(0, 2**32), costs, costs)
def test_tenants_get_their_shares_of_tokens_within_5_percent_under_overload(
    weight: float, other: float, seed: int, most: int, other_most: int
) -> None:
    rng, queue = random.Random(seed), queue_of(a=Standing(weight), b=Standing(other))
    largest = {"a": most, "b": other_most}
    for i in range(20):
        for tenant, limit in largest.items():
            queue.push(tenant, rng.randint(1, limit), i)
    tokens: Counter[str] = Counter()
    # Shares are compared over a time in which each tenant is served often: there is no half of a request.
    while min(tokens["a"] / most, tokens["b"] / other_most) < 60:
        entry = queue.pop()
        assert entry is not None
        tokens[entry.tenant] += int(entry.cost)
        queue.push(entry.tenant, rng.randint(1, largest[entry.tenant]), 0)
    expected = weight / (weight + other)
    assert abs(tokens["a"] / tokens.total() - expected) <= 0.05 * expected + 0.01


@given(st.lists(costs, min_size=1, max_size=20), st.integers(1, 2000), st.floats(0.1, 10.0))
def test_a_flood_delays_a_small_tenant_by_what_its_weight_says(flood: list[int], cost: int, weight: float) -> None:
    queue = queue_of(flood=Standing(weight))
    for i in range(200):
        queue.push("flood", flood[i % len(flood)], i)
    served(queue, 20)
    queue.push("small", cost, 0)
    before = 0.0
    while (entry := queue.pop()) is not None and entry.tenant != "small":
        before += entry.cost
    assert before <= max(flood)  # it has no debt, so its first request is next
    queue.push("small", cost, 1)
    before = 0.0
    while (entry := queue.pop()) is not None and entry.tenant != "small":
        before += entry.cost
    assert before <= cost * weight + 2 * max(flood)


@given(st.lists(st.tuples(st.sampled_from("abc"), costs, st.integers(0, 3)), max_size=80), st.integers(0, 20))
def test_every_request_has_one_end_and_a_tenant_s_are_served_in_their_order(
    steps: list[tuple[str, int, int]], size: int
) -> None:
    queue = queue_of(size, a=Standing(2.0), c=Standing(1.0, priority=1))
    waiting: dict[str, deque[Entry[int]]] = {tenant: deque() for tenant in "abc"}
    for number, (tenant, cost, action) in enumerate(steps):
        entry, displaced = queue.push(tenant, cost, number)
        waiting[tenant].append(entry)
        if displaced is not None:
            assert displaced is waiting[displaced.tenant].pop()  # the newest
        if action == 0 and (entry_served := queue.pop()) is not None:
            assert entry_served is waiting[entry_served.tenant].popleft()
        if action == 1 and waiting[tenant]:
            queue.drop(waiting[tenant][len(waiting[tenant]) // 2])
            del waiting[tenant][len(waiting[tenant]) // 2]
        if action == 2:
            queue.drop(entry) if entry in waiting[tenant] else None
            if entry in waiting[tenant]:
                waiting[tenant].remove(entry)
        queue.settle(tenant, cost - 100)
        assert len(queue) == sum(map(len, waiting.values())) <= size
    for entry in served(queue):
        assert entry is waiting[entry.tenant].popleft()
    assert not any(waiting.values())


def test_priorities_come_first_and_are_displaced_last() -> None:
    queue = queue_of(3, vip=Standing(priority=5))
    for i in range(3):
        queue.push("plain", 10, i)
    vip, displaced = queue.push("vip", 10_000, 0)
    assert displaced is not None
    assert (displaced.tenant, displaced.item) == ("plain", 2)
    assert queue.pop() is vip


def test_a_tenant_with_nothing_but_a_debt_is_not_displaced() -> None:
    queue = queue_of(2, vip=Standing(priority=5))
    for i in range(2):
        queue.push("plain" if i else "vip", 10, i)
    assert [entry.tenant for entry in served(queue, 1)] == ["vip"]
    queue.push("vip", 10, 2)
    queue.pop()
    queue.push("vip", 10, 3)
    entry, displaced = queue.push("vip", 10, 4)
    assert displaced is not None
    assert displaced.tenant == "plain"
    assert served(queue)[-1] is entry


def test_who_floods_a_full_queue_displaces_only_itself() -> None:
    queue = queue_of(10)
    small = [queue.push("small", 10, i)[0] for i in range(2)]
    for i in range(50):
        entry, displaced = queue.push("flood", 10, i)
        assert displaced is None or displaced.tenant == "flood"
        assert i < 8 or displaced is entry
    third, displaced = queue.push("small", 10, 2)
    assert displaced is not None
    assert displaced.tenant == "flood"
    assert {id(entry) for entry in served(queue) if entry.tenant == "small"} == {id(each) for each in (*small, third)}


def test_nobody_waits_in_a_queue_without_room() -> None:
    queue = queue_of(0)
    entry, displaced = queue.push("a", 1, 0)
    assert displaced is entry
    assert (len(queue), queue.pop()) == (0, None)


def test_what_requests_really_cost_decides_in_the_end() -> None:
    """One tenant says ten times what it uses; once that is known, it gets its share nevertheless."""
    queue, tokens = queue_of(), Counter[str]()
    for i in range(10):
        queue.push("modest", 100, i)
        queue.push("boasts", 1000, i)
    for _ in range(4000):
        entry = queue.pop()
        assert entry is not None
        tokens[entry.tenant] += 100
        queue.push(entry.tenant, entry.cost, 0)
        queue.settle(entry.tenant, 100 - entry.cost)
    assert abs(tokens["modest"] / tokens.total() - 0.5) < 0.025


def test_new_weights_and_sizes_count_for_those_that_wait() -> None:
    queue, tokens = queue_of(), Counter[str]()
    for i in range(1000):
        queue.push("a", 10, i)
        queue.push("b", 10, i)
    queue.reconfigure(2000, lambda tenant: Standing(3.0 if tenant == "a" else 1.0))
    for entry in served(queue, 400):
        tokens[entry.tenant] += 1
    assert abs(tokens["a"] / tokens.total() - 0.75) < 0.025
    queue.reconfigure(100, lambda _: Standing())
    assert len(queue) == 1600
    mine, displaced = queue.push("b", 10, -1)
    assert displaced is mine  # the newest of the tenant that has most waiting
    assert len(queue) == 1600


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), max_size=60),
    st.sampled_from("abc"),
)
def test_how_much_is_served_before_a_new_request_is_known(steps: list[tuple[str, int]], tenant: str) -> None:
    queue = queue_of(a=Standing(3.0), c=Standing(1.0, priority=1))
    for number, (each, cost) in enumerate(steps):
        queue.push(each, cost, number)
    said = queue.tokens_ahead(tenant)
    mine, _ = queue.push(tenant, 1, -1)
    before = 0.0
    while (entry := queue.pop()) is not mine:
        assert entry is not None
        before += entry.cost
    assert abs(before - said) <= 100 * (3 + 3)  # two requests of each tenant
