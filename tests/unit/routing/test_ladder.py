"""What a request that has ended puts on the ladder."""

from __future__ import annotations

import time

import pytest

from matrixinfer.pods.registry import EngineMetrics
from matrixinfer.sim.events import EventBatch, encode
from matrixinfer.traffic.peers.message import Load

from .test_router import TOKENS, World, request


def exact(world: World) -> World:
    """With feeds that say all that is cached."""
    for feed in world.feeds.values():
        feed.live(0, encode(EventBatch(ts=0.0, events=[])))
    return world


async def send(world: World, body: bytes | None = None, *, cached: int | None = None) -> str:
    """Send a request. Returns the pod that it went to."""
    sent = await world.dispatch(body)
    sent.answered(200)
    sent.first_byte()
    if cached is not None:
        sent.usage(len(TOKENS), cached)
    await world.finish(sent)
    return sent.pod.name


def losses(world: World) -> dict[str, int]:
    ladder = world.parts.ladder.since(60)
    return {loss.name: loss.tokens for rung in ladder.rungs for loss in rung.losses}


def tokens(world: World) -> list[int | None]:
    return [rung.tokens for rung in world.parts.ladder.since(60).rungs]


async def test_blocks_that_no_engine_can_reuse_are_no_loss_of_the_caches() -> None:
    world = exact(World())
    world.holds("b", 40)
    await send(world, cached=32)
    assert losses(world) == {"ends": 8}  # engine blocks are of 8 tokens, and the last token is always computed
    assert tokens(world) == [32] * 5


async def test_what_the_engine_reuses_less_is_lost_to_the_prediction() -> None:
    world = exact(World())
    world.holds("b", 40)
    await send(world, cached=24)
    assert losses(world) == {"ends": 8, "fewer": 8}
    assert tokens(world) == [32, 32, 32, 32, 24]


async def test_a_pod_that_holds_the_prompt_but_is_busier_is_named() -> None:
    world = exact(World())
    world.holds("b", 40)
    world.peers.update("another gateway", {"b": Load(50, 400_000)}, world.parts.clock())
    assert await send(world) != "b"
    (cause,) = losses(world).keys() - {"ends"}
    assert cause == "busier" or cause.startswith("overloaded:")
    assert tokens(world) == [32, 32, 32, 0, None]


async def test_an_ejected_pod_is_named() -> None:
    world = exact(World())
    world.holds("b", 40)
    world.parts.outliers.busy("b", retry_after=30.0)
    assert await send(world) != "b"
    assert losses(world) == {"withheld": 32, "ends": 8}


@pytest.mark.parametrize(("is_exact", "cause"), [(True, "dropped"), (False, "feed")])
async def test_blocks_that_no_pod_is_known_to_hold_may_be_there_if_its_events_do_not_say_all(
    is_exact: bool, cause: str
) -> None:
    world = exact(World()) if is_exact else World()
    for name in "abc":
        metrics = EngineMetrics(
            running=0, waiting=0, cache_usage=0.0, read_at=time.monotonic(), block_size=8, cache_tokens=1_000
        )
        world.registry.measured(name, metrics)
    for _ in range(2):
        await send(world)
        for name in "abc":
            world.load.forget(name)  # else the prompt would be pending there, or sent there lately
            world.history.forget(name)
    assert losses(world) == {"new": 32, cause: 32, "ends": 16}
    assert world.parts.ladder.since(60).capacity_tokens == 3_000


async def test_without_the_sizes_of_the_caches_nothing_is_said_about_them() -> None:
    world = World()
    world.feeds.clear()
    for _ in range(2):
        await send(world)
        for name in "abc":
            world.load.forget(name)
            world.history.forget(name)
    assert losses(world)["capacity_unknown"] == 36
    assert tokens(world)[1] is None


async def test_a_prompt_without_token_ids_is_counted_and_not_judged() -> None:
    world = exact(World())
    await send(world, request(prompt="text without a tokenizer"))
    (name,) = losses(world)
    assert name == "ids_unknown"
    assert world.parts.ladder.since(60).requests == 1


async def test_a_request_that_no_engine_computed_and_one_that_moved_are_not_compared() -> None:
    world = exact(World())
    world.holds("b", 40)
    await world.finish(await world.dispatch())
    assert world.parts.ladder.since(60).requests == 0
    sent = await world.dispatch()
    sent.move(sent.decision.ranked[1])
    sent.first_byte()
    sent.usage(40, 0)
    await world.finish(sent)
    ladder = world.parts.ladder.since(60)
    assert (ladder.requests, ladder.reported_requests) == (1, 0)


@pytest.mark.parametrize("model", ["m", "lora"])
async def test_models_that_are_served_are_remembered(model: str) -> None:
    world = exact(World())
    await send(world, request(model=model))
    world.router.keep_models()
    assert len(world.parts.ladder) == 10
