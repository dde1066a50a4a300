"""Whose fault a failure is: what requests that fail everywhere, or take long, do to the endpoints that got them."""

from __future__ import annotations

import pytest

from matrixinfer.config import OutliersConfig, SchedulerConfig
from matrixinfer.pods.outliers import Outliers
from matrixinfer.routing.blame import Blame
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.scheduler.policies import with_policy

from .test_router import World, ranked, request


@pytest.fixture
async def world() -> World:
    """A gateway whose policy sends a prompt to the pod that holds it, however short it is."""
    return World(config=with_policy(SchedulerConfig(), "cached_share"))


def states(world: World) -> dict[str, str]:
    return {name: world.parts.outliers.state(name) for name in "abc"}


async def send(world: World, *outcomes: str, stream: bool = False) -> InFlight:
    """A request that goes from endpoint to endpoint as the front would send it, with these outcomes."""
    sent = await world.dispatch(request(stream=stream))
    for number, outcome in enumerate(outcomes):
        if number:
            following = sent.following()
            assert following is not None
            sent.move(following)
        end(sent, outcome)
    await world.finish(sent)
    return sent


def end(sent: InFlight, outcome: str) -> None:
    if not outcome.isdigit():
        sent.failed(outcome)
        return
    sent.answered(int(outcome))
    if outcome == "200":
        sent.first_byte()


async def fail(world: World, name: str, times: int, outcome: str = "500") -> None:
    """Requests that fail at one endpoint, and go to no other."""
    world.holds(name, 32)
    for _ in range(times):
        sent = await send(world, outcome)
        assert sent.tried[0].name == name


async def test_server_errors_alone_eject_nothing_but_ask_for_a_second_opinion(world: World) -> None:
    await fail(world, "a", 20)
    assert states(world) == dict.fromkeys("abc", "admitted")
    sent = await world.dispatch()
    assert not sent.needs_witness
    sent.answered(500)
    assert sent.needs_witness


@pytest.mark.parametrize("outcome", ["500", "disconnect", "protocol"])
async def test_an_endpoint_is_ejected_once_another_one_answers_what_it_failed(world: World, outcome: str) -> None:
    await fail(world, "a", 2, outcome)
    sent = await send(world, outcome, "200")
    assert sent.tried[0].name == "a"
    assert states(world) == {"a": "ejected", "b": "admitted", "c": "admitted"}
    assert f"the last: {outcome}" in str(world.parts.outliers.reason("a"))


@pytest.mark.parametrize("second", ["500", "502", "disconnect", "400", "422"])
async def test_what_fails_at_a_second_endpoint_as_well_is_void_at_both(world: World, second: str) -> None:
    for _ in range(10):
        await fail(world, "a", 2)
        await send(world, "500", second)
    assert states(world) == dict.fromkeys("abc", "admitted")
    await fail(world, "a", 2)  # two, and not twenty-two
    assert not world.parts.outliers.is_due("a")


def test_endpoints_that_all_failed_what_one_answers_are_all_to_blame() -> None:
    outliers = Outliers(OutliersConfig(), lambda: 100.0)
    for name in ("a", "b"):
        for _ in range(2):
            outliers.doubted(name, "500")
    blame = Blame(outliers)
    for name in ("a", "b", "c"):
        blame.accuse(name, "500", is_probe=False)
    blame.answered()
    assert [outliers.state(name) for name in "abc"] == ["ejected", "ejected", "admitted"]


@pytest.mark.parametrize("second", ["503", "429", "connect", "timeout"])
async def test_a_second_endpoint_that_says_nothing_about_the_request_leaves_the_doubt(
    world: World, second: str
) -> None:
    await fail(world, "a", 2)
    await send(world, "500", second)
    assert states(world)["a"] == "admitted"
    assert world.parts.outliers.is_due("a")
    await send(world, "500", second, "200")
    assert states(world)["a"] == "ejected"


async def test_while_another_endpoint_is_asked_the_accused_gets_no_requests(world: World) -> None:
    await fail(world, "a", 2)
    sent = await world.dispatch()
    sent.answered(500)
    witness = sent.following()
    assert witness is not None
    sent.move(witness)
    assert states(world)["a"] == "checked"
    assert (await world.dispatch()).decision.chosen.name != "a"
    await world.finish(sent)  # the client has gone
    assert states(world)["a"] == "admitted"


async def test_two_broken_endpoints_are_found_although_each_fails_what_the_other_failed(world: World) -> None:
    world.holds("a", 32)
    world.holds("b", 16)
    broken, answered = {"a", "b"}, 0
    for _ in range(30):
        sent = await world.dispatch()
        for _ in range(3):
            if sent.pod.name not in broken:
                end(sent, "200")
                answered += 1
                break
            sent.answered(500)
            witness = sent.following()
            if not sent.needs_witness or witness is None:
                break
            sent.move(witness)
        await world.finish(sent)
    assert states(world)["a"] == "ejected"
    assert states(world)["c"] == "admitted"
    assert answered > 20


async def test_a_rank_of_the_same_pod_is_a_second_opinion_where_there_is_no_other_pod() -> None:
    world = ranked(32, 8)
    for _ in range(3):
        sent = await world.dispatch()
        assert sent.pod.name == "b@dp0"
        sent.answered(500)
        if not sent.needs_witness:
            await world.finish(sent)
    others = []
    while (following := sent.following()) is not None:
        others.append(following.name)
        sent.move(following)
    assert others[-1] == "b@dp1"  # other pods first
    end(sent, "200")
    assert world.parts.outliers.state("b@dp0") == "ejected"


def test_a_probe_that_fails_elsewhere_as_well_is_followed_by_another_one() -> None:
    now = 100.0
    outliers = Outliers(OutliersConfig(), lambda: now)
    for _ in range(3):
        outliers.failed("a", "reset")
    now += 5.0
    assert outliers.started("a")
    blame = Blame(outliers)
    blame.accuse("a", "500", is_probe=True)
    assert blame.needs_witness
    assert not outliers.started("a")  # the verdict is still to come
    blame.accuse("b", "500", is_probe=False)
    assert not blame.needs_witness
    blame.close()
    assert outliers.started("a")
    blame.accuse("a", "500", is_probe=True)
    blame.answered()
    assert outliers.state("a") == "ejected"
    assert outliers.reason("a") == "ejected for 10.0 s more (its probe failed: 500)"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answers_others", [False, True])
async def test_a_long_answer_is_no_failure_of_an_endpoint_that_answers_others(
    world: World, stream: bool, answers_others: bool
) -> None:
    world.holds("a", 32)
    for _ in range(3):
        sent = await world.dispatch(request(stream=stream))
        if answers_others:
            other = await world.dispatch()
            end(other, "200")
            assert other.pod.name == "a"
            await world.finish(other)
        sent.failed("timeout")
        await world.finish(sent)
    failures = world.parts.outliers.failures("a")
    assert (failures == 0) == (answers_others and not stream)
    if not answers_others:
        assert states(world)["a"] == "ejected"


def test_where_no_other_endpoint_may_be_asked_every_failure_counts() -> None:
    outliers = Outliers(OutliersConfig(), lambda: 100.0, can_check=False)
    for _ in range(3):
        outliers.doubted("a", "500")
    assert outliers.state("a") == "ejected"


@pytest.mark.parametrize(
    ("outcomes", "busy"),
    [(["429"], 1), (["429", "429"], 0), (["429", "429", "200"], 2), (["503", "503"], 2), (["429", "503"], 2)],
)
async def test_a_limit_on_the_client_makes_no_endpoint_busy(world: World, outcomes: list[str], busy: int) -> None:
    await send(world, *outcomes)
    assert sorted(states(world).values()) == ["admitted"] * (3 - busy) + ["busy"] * busy
