"""Replays: what gateways know is what engines hold, whatever happens, and equal settings give equal results."""

from __future__ import annotations

import pytest

from matrixinfer.study.faults import Fault
from matrixinfer.study.fleet import Fleet
from matrixinfer.study.measures import measures
from matrixinfer.study.policies import POLICIES
from matrixinfer.study.replay import Replay
from matrixinfer.study.runs import replay, replay_all
from matrixinfer.study.trace import Alphabet, LetterBlocks, Trace, Turn, filled
from tests.unit.study.support import Watched, chats, fleet


def known_to(watched: Watched, gateway: int) -> dict[str, set[int]]:
    """The prompts' blocks that a gateway believes to be at each pod."""
    run = watched.replay
    router = watched.gateways[gateway]
    watched.settle(router)
    found: dict[str, set[int]] = {name: set() for name in run.pods}
    for job in run.jobs:
        for pod, count in router.holds(job.hashes).items():
            found[pod].update(job.hashes[:count])
    return found


def held(run: Replay) -> dict[str, set[int]]:
    """The blocks that a prompt can find at each pod."""
    return {
        name: {key for job in run.jobs for key in job.hashes[: pod.engine.pool.count(job.hashes)]}
        for name, pod in run.pods.items()
        if pod.is_listed
    }


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        ({}, []),
        ({"gateways": 3}, []),
        ({"gateways": 3, "gossip": True}, ["restart@6:1:3"]),
        ({"event_loss": 0.2, "gateways": 2}, []),
        ({"event_delay": 0.5}, ["reset@5:1", "slow@3:2:4", "small@0:0:0.3"]),
        ({"gateways": 2}, ["restart@6:1:3"]),
        ({"event_loss": 0.1}, ["restart@6:1:3", "restart@9:2:1", "join@8"]),
        ({"gateways": 2}, ["forget@7"]),
        ({}, ["leave@6:0", "join@6"]),
    ],
)
def test_in_the_end_each_gateway_knows_exactly_what_each_engine_holds(
    settings: dict[str, object], faults: list[str]
) -> None:
    trace = chats()
    watched = Watched(trace, fleet(trace, faults=[Fault.parse(text) for text in faults], **settings))
    run = watched.replay
    assert sum(job.ended is not None for job in run.jobs) + run.broken_off == len(trace.turns)
    truth = held(run)
    assert any(truth.values())
    gateways = run.fleet.gateways
    for number in range(len(watched.gateways) - gateways, len(watched.gateways)):
        known = known_to(watched, number)
        assert {name: known[name] for name in truth} == truth


def test_while_no_event_is_late_the_predicted_hits_are_the_engines() -> None:
    trace = chats(interval=4, think=30)
    run = Watched(trace, fleet(trace, event_delay=0.0)).replay
    assert [job.predicted for job in run.jobs] == [job.cached for job in run.jobs]
    assert sum(job.cached for job in run.jobs) > sum(job.prompt for job in run.jobs) / 2


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_every_request_and_repeats_itself(policy: str) -> None:
    trace = chats(sessions=16, turns=3)
    settings = fleet(trace, gateways=2, seed=7, event_loss=0.05)
    first, second = (replay(trace, settings, POLICIES[policy]) for _ in range(2))
    assert first.results == second.results
    assert first.requests == second.requests
    assert len(first.requests) == len(trace.turns)
    hits = first.results["hit_rate"]
    assert hits is not None
    assert 0 <= hits <= trace.ideal_hit_rate(LetterBlocks()) + 1e-4


def test_gateways_that_talk_know_what_the_others_have_in_flight() -> None:
    letters = Alphabet()
    trace = of(*(turn(letters, 4000, 100, delay=n * 0.3) for n in range(30)))
    waits = []
    for gossip in (False, True):
        done = run(trace, fleet(trace, gateways=3, gossip=gossip, scrape_interval=100.0), "kv_aware")
        waits.append(measures(done)["ttft_mean_s"])
    assert waits[0] is not None
    assert waits[1] is not None
    assert waits[1] < waits[0]


def test_another_seed_draws_another_route() -> None:
    trace = chats()
    one, two = (replay(trace, fleet(trace, seed=seed), POLICIES["random"]) for seed in (1, 2))
    assert one.requests != two.requests


def test_several_processes_give_the_results_of_one() -> None:
    trace = chats(sessions=6, turns=2)
    policies = [POLICIES["random"], POLICIES["kv_aware"]]
    alone = {each.policy: each.results for each in replay_all(trace, fleet(trace), policies)}
    together = {each.policy: each.results for each in replay_all(trace, fleet(trace), policies, jobs=2)}
    assert together == alone


def turn(alphabet: Alphabet, prompt: int, reply: int = 1, *, delay: float = 0.0, after: int | None = None) -> Turn:
    word = filled(alphabet.new(prompt // 16), prompt, reply, 16, alphabet)
    return Turn(session="s", delay=delay, after=after, prompt=prompt, reply=reply, letters=word)


def of(*turns: Turn) -> Trace:
    return Trace(name="t", block_size=16, turns=turns)


def run(trace: Trace, settings: Fleet, policy: str = "round_robin") -> Replay:
    chosen = POLICIES[policy]
    made = Replay(trace, settings, chosen.make, publishes=chosen.publishes, shares_cache=chosen.shares_cache)
    made.run()
    return made


def test_a_turn_waits_for_the_answer_before_it_and_then_its_delay() -> None:
    letters = Alphabet()
    trace = of(turn(letters, 1000, 50, delay=3.0), turn(letters, 100, delay=2.0, after=0))
    done = run(trace, fleet(trace))
    assert done.jobs[0].arrived == 3.0
    assert done.jobs[0].ended is not None
    assert done.jobs[1].arrived == pytest.approx(done.jobs[0].ended + 2.0)


def test_the_rate_is_of_arrivals_and_not_of_think_times() -> None:
    letters = Alphabet()
    trace = of(turn(letters, 1000, 50, delay=3.0), turn(letters, 100, delay=2.0, after=0))
    done = run(trace, fleet(trace, rate_scale=3.0))
    assert done.jobs[0].arrived == 1.0
    assert done.jobs[0].ended is not None
    assert done.jobs[1].arrived == pytest.approx(done.jobs[0].ended + 2.0)


def test_requests_longer_than_every_cache_are_left_out_and_their_sessions_go_on() -> None:
    letters = Alphabet()
    trace = of(turn(letters, 30_000), turn(letters, 100, after=0))
    done = run(trace, fleet(trace))
    assert done.too_long == 1
    assert [job.number for job in done.jobs] == [1]


def test_a_request_that_one_pod_cannot_hold_goes_to_another() -> None:
    letters = Alphabet()
    trace = of(*(turn(letters, 15_000, delay=each) for each in range(6)))
    small = [Fault.parse("small@0:0:0.5"), Fault.parse("small@0:1:0.5")]
    for policy in ("round_robin", "kv_aware", "clairvoyant"):
        assert {job.pod for job in run(trace, fleet(trace, faults=small), policy).jobs} == {"pod-2"}


def test_a_restart_sends_what_had_no_token_elsewhere_and_breaks_off_the_rest() -> None:
    letters = Alphabet()
    trace = of(turn(letters, 100, 2000), turn(letters, 100, 2000), turn(letters, 9000, 5, delay=1.0))
    settings = fleet(trace, pods=2, faults=[Fault.parse("restart@1.05:0:20")])
    done = run(trace, settings)
    assert done.broken_off == 1
    assert done.jobs[2].pod == "pod-1"
    assert done.jobs[2].first is not None
    assert done.jobs[2].first > 1.05


@pytest.mark.parametrize("policy", ["round_robin", "kv_aware", "clairvoyant", "session_hash"])
def test_without_a_pod_that_can_take_it_a_request_waits_and_in_the_end_is_given_up(policy: str) -> None:
    letters = Alphabet()
    trace = of(turn(letters, 9000, delay=2.0))
    faults = [Fault.parse(text) for text in ("small@0:0:0.3", "restart@1:1:30")]
    waited = run(trace, fleet(trace, pods=2, faults=faults), policy)
    assert waited.jobs[0].pod == "pod-1"
    assert waited.jobs[0].first is not None
    assert waited.jobs[0].first > 31
    gone = run(trace, fleet(trace, pods=2, faults=[Fault.parse("leave@1:0"), Fault.parse("leave@1:1")]), policy)
    assert gone.broken_off == 1
    assert gone.now == pytest.approx(601, abs=2)


def test_a_slow_pod_takes_longer_in_proportion() -> None:
    letters = Alphabet()
    trace = of(turn(letters, 5000, 20, delay=1.0))
    normal, slow = (run(trace, fleet(trace, pods=1, faults=faults)) for faults in ([], [Fault.parse("slow@0:0:3")]))
    ends = [each.jobs[0].ended for each in (normal, slow)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[1] - 1.0 == pytest.approx(3 * (ends[0] - 1.0))


def test_one_cache_of_all_pods_finds_what_any_pod_has_computed() -> None:
    letters = Alphabet()
    word = letters.new(64)
    asked = [Turn(session=f"{n}", delay=n * 5.0, prompt=1024, reply=1, letters=word) for n in range(4)]
    trace = of(*asked)
    assert [job.cached for job in run(trace, fleet(trace), "round_robin").jobs] == [0, 0, 0, 1008]
    assert [job.cached for job in run(trace, fleet(trace), "pooled").jobs] == [0, 1008, 1008, 1008]


def test_measures_are_what_the_requests_show() -> None:
    letters = Alphabet()
    trace = of(turn(letters, 1000, 11), turn(letters, 1000, 11, delay=100.0))
    done = run(trace, fleet(trace, pods=2))
    shown = measures(done)
    firsts = [job.first - job.arrived for job in done.jobs if job.first is not None]
    assert shown["ttft_mean_s"] == pytest.approx(sum(firsts) / 2, rel=1e-5)
    lasts = [job.ended - job.first for job in done.jobs if job.ended is not None and job.first is not None]
    assert shown["tpot_s"] == pytest.approx(sum(lasts) / 20, rel=1e-5)
    assert shown["imbalance"] == pytest.approx(1.0)
    assert shown["hit_rate"] == 0
    assert shown["requests"] == 2
