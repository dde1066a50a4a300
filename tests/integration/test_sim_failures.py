"""Failures that the simulated engine can reproduce: lost frames, restarts, hits reported as stored blocks."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.model import Timing
from tests.waiting import eventually

from .sim_support import CONFIG, Feed, running, subscribed

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


async def sequence_numbers(feed: Feed) -> list[int]:
    """Sequence numbers of the live frames so far."""
    frames = []
    while not await feed.is_silent():
        frames.append(int.from_bytes((await feed.next())[1], "big"))
    return frames


async def test_a_seed_decides_which_frames_are_lost_and_all_can_be_replayed(tokenizer: LocalTokenizer) -> None:
    lost = []
    for seed in (1, 1, 2):
        lossy = replace(CONFIG, lose_frames=0.3, seed=seed)
        async with running(tokenizer, lossy) as client, subscribed(client.engine) as feed:
            for i in range(30):
                await client.complete([i] * 5)
            lost.append(set(range(30)) - set(await sequence_numbers(feed)))
            assert [int.from_bytes(frame[2], "big") for frame in (await feed.replay(0))[:-1]] == list(range(30))
    assert 3 <= len(lost[0]) <= 15
    assert lost[0] == lost[1] != lost[2]


async def test_the_next_frames_can_be_lost_on_demand(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client, subscribed(client.engine) as feed:
        client.engine.ranks[0].publisher.lose(2)
        for i in range(4):
            await client.complete([i] * 5)
        assert await sequence_numbers(feed) == [2, 3]


async def test_only_buffered_batches_are_replayed(tokenizer: LocalTokenizer) -> None:
    async with (
        running(tokenizer, replace(CONFIG, buffer_batches=2)) as client,
        subscribed(client.engine) as feed,
    ):
        for i in range(5):
            await client.complete([i] * 5)
        assert [int.from_bytes(frame[2], "big") for frame in (await feed.replay(0))[:-1]] == [3, 4]
        assert (await client.get("/kv_event_sources"))["0"]["buffer_steps"] == 2


async def test_a_restart_clears_the_cache_and_the_sequence_numbers(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client, subscribed(client.engine) as feed:
        for i in (1, 2):
            await client.complete([i] * 5)
        client.engine.restart()
        assert await client.complete([1] * 5) == 0
        assert await sequence_numbers(feed) == [0, 1, 0]
        assert len(await feed.replay(0)) == 1 + 1
        assert client.engine.stats.prefix_queries == 5


async def test_a_busy_engine_refuses_to_restart(tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer, replace(CONFIG, timing=Timing(step=0.05))) as client:
        busy = asyncio.create_task(client.complete(PROMPT, max_tokens=5))
        await eventually(lambda: client.engine.stats.running > 0)
        with pytest.raises(RuntimeError, match="in flight"):
            client.engine.restart()
        assert await busy == 0


async def test_a_request_can_have_its_hits_reported_as_stored(tokenizer: LocalTokenizer) -> None:
    full = {"kv_cache_report_mode": "full"}
    async with running(tokenizer) as client, subscribed(client.engine) as feed:
        assert await client.complete(PROMPT, vllm_xargs=full) == 0
        (first,) = await feed.events()
        assert await client.complete(PROMPT, vllm_xargs={"kv_cache_report_mode": "incremental"}) == 8
        assert await feed.is_silent()
        assert await client.complete(PROMPT, vllm_xargs=full) == 8
        assert await feed.events() == [first]


async def test_evicted_blocks_are_loaded_from_the_cpu(tokenizer: LocalTokenizer) -> None:
    small = replace(CONFIG, num_blocks=4, cpu_blocks=20)
    async with running(tokenizer, small) as client, subscribed(client.engine) as feed:
        assert [await client.complete(prompt) for prompt in (PROMPT, [7] * 9, PROMPT)] == [0, 0, 8]
        media = [(event["type"], event["medium"]) for _ in range(3) for event in await feed.events()]
        metrics = await client.metrics()
    assert media[:3] == [("BlockStored", "GPU"), ("BlockStored", "CPU"), ("BlockStored", "CPU")]
    assert (media.count(("BlockStored", "CPU")), media.count(("BlockRemoved", "GPU"))) == (4, 4)
    assert metrics["vllm:external_prefix_cache_hits_total"] == 8
    assert metrics["vllm:prefix_cache_hits_total"] == 0


@pytest.mark.parametrize("wrong", [{"lose_frames": 1.1}, {"lose_frames": -0.1}, {"cpu_blocks": -1}])
def test_shares_and_sizes_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="of at least 0"):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]
