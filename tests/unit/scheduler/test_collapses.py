"""What makes routing policies collapse, in virtual time, with the real scheduler."""

from __future__ import annotations

from .queue_model import Asked, Engine, Fleet, conversation, equal, new_blocks, poisson

POLICY, BEFORE = "kv_aware", "cached_share"


def universal_prefix(policy: str) -> Fleet:
    """Every prompt begins with the same 8,192 tokens; one pod cannot serve them all."""
    fleet, shared = Fleet(policy, equal(4)), new_blocks(64)
    for at in poisson(10.0, 60.0):
        fleet.ask(at, Asked(chain=[*shared, *new_blocks(16)]))
    fleet.run()
    return fleet


def test_a_universal_prefix_is_replicated_and_does_not_pile_up() -> None:
    fleet = universal_prefix(POLICY)
    assert max(fleet.spread().values()) < 1.5 * len(fleet.sent) / 4
    assert fleet.mean_ttft() < 0.7
    assert fleet.hit_rate() > 0.77  # 0.8 is shared
    assert all(each.cached >= 64 for each in fleet.sent[-100:])


def test_a_very_long_universal_prefix_does_not_draw_every_request_to_one_pod() -> None:
    """100,000 tokens take twelve seconds elsewhere, the rest of each prompt a moment; answers take twenty."""
    fleet, shared = Fleet(POLICY, equal(4)), new_blocks(800)
    fleet.ask(0.0, Asked(chain=shared))
    for at in poisson(6.0, 60.0):
        fleet.ask(20.0 + at, Asked(chain=[*shared, *new_blocks(1)], decode_seconds=20.0))
    shares: list[float] = []

    def look() -> None:
        there = [engine.active + len(engine.queue) for engine in fleet.engines.values()]
        if sum(there) >= 64:
            shares.append(max(there) / sum(there))

    for second in range(20, 80):
        fleet.at(second, look)
    fleet.run()
    assert shares
    assert max(shares) < 1.9 / 4
    assert fleet.mean_ttft() < 2.0


def test_a_hot_prefix_is_computed_at_a_second_pod_once_queueing_costs_more() -> None:
    fleet, shared = Fleet(POLICY, equal(2)), new_blocks(32)
    fleet.ask(0.0, Asked(chain=shared))
    for number in range(12):  # 1,024 tokens each: an eighth of a second, where the prefix takes half a second
        fleet.ask(10.0 + number * 0.01, Asked(chain=[*shared, *new_blocks(8)]))
    fleet.run()
    first, second = fleet.sent[1].pod, ({"pod-0", "pod-1"} - {fleet.sent[1].pod}).pop()
    order = [each.pod for each in fleet.sent[1:]]
    assert order[:2] == [first] * 2  # waiting for one prompt is cheaper than the prefix
    assert second in order[2:5]
    assert 4 <= fleet.spread()[second] <= 6


def test_a_cold_burst_spreads_over_the_fleet() -> None:
    fleet = Fleet(POLICY, equal(8))
    for _ in range(64):
        fleet.ask(1.0, Asked(chain=new_blocks(32)))
    fleet.run()
    assert max(fleet.spread().values()) <= 9
    assert fleet.slowest() < 9 * (32 * 128 / 8_000) * 1.3


def test_one_huge_conversation_does_not_delay_the_others() -> None:
    fleet = Fleet(POLICY, equal(4))
    conversation(fleet, 0.0, first=1_600, turns=4, grows=400, label="huge")
    for number in range(24):
        conversation(fleet, 0.1 + number * 0.5, first=8, turns=10, label="small")
    fleet.run()
    assert fleet.slowest("small") < 1.0
    assert len(fleet.spread("huge")) == 1  # and it keeps its own cache


def test_a_new_pod_gets_its_share() -> None:
    def run(policy: str) -> Fleet:
        fleet = Fleet(policy, equal(3))
        for number, at in enumerate(poisson(1.2, 60.0)):
            conversation(fleet, at, first=24, turns=4, grows=8, session=f"s{number}")

        def join() -> None:
            fleet.engines["new"] = Engine(name="new")

        fleet.at(30.0, join)
        fleet.run()
        return fleet

    fleet = run(POLICY)
    later = [each for each in fleet.sent if 35.0 < each.at < 60.0]
    assert sum(each.pod == "new" for each in later) > 0.15 * len(later)


def test_a_cold_engine_does_not_stay_idle_while_requests_wait_at_a_warm_one() -> None:
    """One of two engines has restarted: its cache is empty, and the other one holds every conversation."""

    def run(policy: str) -> Fleet:
        warm, cold = Engine(name="warm", rate=1_700.0), Engine(name="cold", rate=1_700.0)
        fleet = Fleet(policy, [warm, cold])
        chains = [new_blocks(16) for _ in range(12)]
        for chain in chains:
            warm.store(chain)
        for number in range(48):  # each needs a third of a second where it is warm, one and a half where it is cold
            chains[number % 12] = [*chains[number % 12], *new_blocks(4)]
            fleet.ask(number * 0.12, Asked(chain=chains[number % 12], decode_seconds=2.0))
        fleet.run()
        return fleet

    fleet, before = run(POLICY), run(BEFORE)
    assert fleet.spread()["cold"] >= 12
    assert fleet.mean_ttft() < 0.9 * before.mean_ttft()
    assert fleet.slowest() < 0.7 * before.slowest()


def test_a_dead_slow_pod_is_avoided_before_and_after_its_first_answer() -> None:
    engines = equal(4)
    engines[0].rate = 100.0
    fleet = Fleet(POLICY, engines)
    for at in poisson(4.0, 120.0):
        fleet.ask(at, Asked(chain=new_blocks(16)))
    fleet.run()
    assert fleet.spread()["pod-0"] <= 0.03 * len(fleet.sent)
    others = sorted(each.ttft for each in fleet.sent if each.pod != "pod-0")
    assert others[int(0.9 * len(others))] < 1.0


def test_a_pod_that_was_slow_once_is_tried_again() -> None:
    engines = equal(2)
    engines[0].rate = 100.0
    fleet = Fleet(POLICY, engines)
    for at in poisson(3.0, 600.0):
        fleet.ask(at, Asked(chain=new_blocks(16)))
    fleet.at(60.0, lambda: setattr(engines[0], "rate", 8_000.0))
    fleet.run()
    late = [each.pod for each in fleet.sent if each.at > 400.0]
    assert late.count("pod-0") > 0.3 * len(late)


def test_a_small_cache_beside_large_ones_keeps_fewer_conversations() -> None:
    def run(policy: str) -> Fleet:
        engines = [
            Engine(name="small", capacity=200),
            Engine(name="a", capacity=1_200),
            Engine(name="b", capacity=1_200),
        ]
        fleet = Fleet(policy, engines)
        for number in range(48):
            conversation(fleet, number * 0.7, first=16, turns=12, grows=2, pause=8.0, session=f"s{number}")
        fleet.run()
        return fleet

    fleet, before = run(POLICY), run(BEFORE)
    assert fleet.hit_rate() > before.hit_rate() + 0.03
    assert fleet.spread()["small"] < 0.25 * len(fleet.sent)


def test_first_turns_go_where_they_push_out_least() -> None:
    """Two idle pods: one cache is full of conversations that go on, the other has room."""
    full, roomy = Engine(name="full", capacity=512), Engine(name="roomy", capacity=512)
    fleet, going_on = Fleet(POLICY, [full, roomy]), [new_blocks(32) for _ in range(16)]
    for chain in going_on:
        full.store(chain)
    full.footprint.evicted_tokens = 1_000
    for number in range(8):
        fleet.ask(1.0 + 2.0 * number, Asked(chain=new_blocks(32), decode_seconds=0.5, label="first"))
    fleet.run()
    assert fleet.spread("first") == {"roomy": 8}
    assert all(full.held(chain) == 32 for chain in going_on)


def test_a_warm_conversation_is_not_sent_away_by_a_few_requests() -> None:
    """Seven requests decode at its pod, and computing its prompt elsewhere takes a second."""

    def run(policy: str) -> Asked:
        fleet, chain = Fleet(policy, equal(2, rate=2_000.0)), new_blocks(16)
        fleet.engines["pod-0"].store(chain)
        for _ in range(7):
            own = new_blocks(1)
            fleet.engines["pod-0"].store(own)
            fleet.ask(0.0, Asked(chain=own, decode_seconds=20.0))
        asked = Asked(chain=[*chain, *new_blocks(1)])
        fleet.ask(5.0, asked)
        fleet.run()
        return asked

    assert (run(BEFORE).pod, run(POLICY).pod) == ("pod-1", "pod-0")


def test_the_sub_agents_of_one_session_share_what_is_cheaper_to_share() -> None:
    """Twelve agents start at once with one prefix of 12,800 tokens: neither all on one pod nor each alone."""
    fleet, shared = Fleet(POLICY, equal(4)), new_blocks(100)
    for _ in range(12):
        fleet.ask(1.0, Asked(chain=[*shared, *new_blocks(25)], session="s", decode_seconds=3.0))
    fleet.run()
    computed = sum(each.cached < 100 for each in fleet.sent)
    assert 2 <= computed <= 4  # the prefix is computed at a few pods
    assert fleet.slowest() < 12 * 25 * 128 / 8_000 + 1.6  # below that of one pod alone
    spread = fleet.spread()
    assert max(spread.values()) <= 6
