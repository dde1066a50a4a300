"""What goes wrong between engines and index, through the whole gateway: afterwards predictions are what engines find."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from matrixinfer.config import PluginArgs, PodConfig, SchedulerConfig
from matrixinfer.kvevents import subscription
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.sim.server import SimEngine
from matrixinfer.trust import drift
from tests.ports import free_port, two_ports

from .fleet import Answer, Fleet, fleet, gateway

COMPLETIONS = "/v1/completions"
BLOCK = 16
ENGINE = SimEngineConfig(
    model="m", block_size=BLOCK, num_blocks=2_000, timing=Timing(step=0.0005, prefill_token=0, decode_sequence=0)
)
SCHEDULER = SchedulerConfig(
    plugin_config=(PluginArgs(name="kvcache-aware", args={"blockSizeToHash": BLOCK, "maxBlocksToMatch": 0}),),
    pending_seconds=0,
)
FULL = {"vllm_xargs": {"kv_cache_report_mode": "full"}}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "HEARTBEAT_SECONDS", 0.05)


def body(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "max_tokens": 1, **more}


def prompts(count: int, *, seed: int = 0, families: int = 4, length: int = 6) -> Iterator[list[int]]:
    """Prompts that share prefixes: of a few families, each cut somewhere, often with something new behind."""
    draw = random.Random(seed)
    texts = [[draw.randrange(1000) for _ in range(length * BLOCK)] for _ in range(families)]
    for _ in range(count):
        prefix = draw.choice(texts)[: draw.randrange(1, length * BLOCK + 1)]
        yield prefix + [draw.randrange(1000) for _ in range(draw.randrange(3 * BLOCK))]


async def serve(target: Fleet, count: int, *, seed: int = 0, **shape: int) -> list[Answer]:
    """Ask for many prompts, one after the other; every batch of events is seen before the next."""
    answers = []
    for prompt in prompts(count, seed=seed, **shape):
        await target.settled()
        answers.append(await target.ask(COMPLETIONS, body(prompt)))
    await target.settled()
    return answers


def wrong(answers: list[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.predicted != answer.cached]


async def test_repeats_land_on_the_rank_that_holds_them(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, replace(ENGINE, data_parallel_size=2), pods=2, scheduler=SCHEDULER) as target:
        answers = await serve(target, 40)
        assert not wrong(answers)
        used = {answer.endpoint for answer in answers}
        assert len(used) > 1
        assert used <= {f"pod-{pod}@dp{rank}" for pod in (0, 1) for rank in (0, 1)}
        warm = await target.ask(COMPLETIONS, body([7] * 100))
        await target.settled()
        again = [await target.ask(COMPLETIONS, body([7] * 100)) for _ in range(4)]
        assert again == [Answer(96, 96, warm.endpoint)] * 4
        pod, rank = warm.endpoint.removeprefix("pod-").split("@dp")
        stats = target.engines[int(pod)].ranks[int(rank)].stats
        assert stats.prefix_hits >= 4 * 96


async def test_an_adapter_and_its_model_share_no_hits(tokenizer: LocalTokenizer) -> None:
    names = ("m", "french", "terse")
    async with fleet(tokenizer, replace(ENGINE, loras=names[1:]), pods=2, scheduler=SCHEDULER) as target:
        draw = random.Random(3)
        answers = []
        for prompt in prompts(60, families=2):
            await target.settled()
            salt = {"cache_salt": "s"} if draw.random() < 0.3 else {}
            answers.append(await target.ask(COMPLETIONS, body(prompt, **salt) | {"model": draw.choice(names)}))
        assert not wrong(answers)
        assert sum(answer.cached for answer in answers) > 0
        for name in names:
            await target.settled()
            fresh = await target.ask(COMPLETIONS, body([9] * 100) | {"model": name})
            assert (fresh.predicted, fresh.cached) == (0, 0)


async def test_lost_frames_are_replayed(tokenizer: LocalTokenizer) -> None:
    lossy = replace(ENGINE, lose_frames=0.2, seed=1, num_blocks=60)
    async with fleet(tokenizer, lossy, pods=2, scheduler=SCHEDULER) as target:
        await target.settled()
        for prompt in prompts(60, seed=1):
            await target.post(COMPLETIONS, body(prompt))
        assert not wrong(await serve(target, 60))
        stats = [feed.stats for feed in target.service.engines.subscriber.feeds.values()]
        assert sum(each.gaps for each in stats) > 0
        assert sum(each.silent_losses for each in stats) > 2
        assert {answer.cached > 0 for answer in await serve(target, 20)} == {False, True}


async def test_a_restart_of_the_engine_is_noticed_and_nothing_of_the_old_one_is_left(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=2, scheduler=SCHEDULER) as target:
        await serve(target, 20)
        for engine in target.engines:
            engine.restart()
        # The old sequence numbers have not come up yet, so only live frames show the restart.
        for prompt in prompts(4, seed=2):
            await target.post(COMPLETIONS, body(prompt))
        assert not wrong(await serve(target, 30))


async def test_an_engine_that_goes_and_comes_back_is_indexed_again(tokenizer: LocalTokenizer) -> None:
    async with AsyncExitStack() as stack:
        kv_port, replay_port = two_ports()
        fixed = replace(ENGINE, port=free_port(), kv_port=kv_port, replay_port=replay_port)
        first = await stack.enter_async_context(SimEngine(fixed, tokenizer))
        target = await stack.enter_async_context(gateway([first], scheduler=SCHEDULER))
        assert not wrong(await serve(target, 20))
        await first.__aexit__(None, None, None)
        second = await stack.enter_async_context(SimEngine(fixed, tokenizer))
        back = replace(target, engines=[second])
        answers = await serve(back, 30)
        assert not wrong(answers)
        assert answers[0].cached == 0


async def test_an_engine_that_joins_is_used_and_one_that_leaves_is_not_remembered(tokenizer: LocalTokenizer) -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(SimEngine(ENGINE, tokenizer)) for _ in range(2)]
        target = await stack.enter_async_context(gateway([first], scheduler=SCHEDULER))
        assert not wrong(await serve(target, 10))
        target.service.join(PodConfig(name="pod-1", url=second.url))
        both = replace(target, engines=[first, second])
        await both.settled()
        # A family begins at a random pod. So many of them leave one pod idle in one run of 2 ** 34.
        answers = await serve(both, 60, seed=1, families=40)
        assert not wrong(answers)
        assert {answer.endpoint for answer in answers} == {"pod-0", "pod-1"}
        target.service.leave("pod-0")
        answers = await serve(replace(target, engines=[]), 10, seed=1)
        assert {answer.endpoint for answer in answers} == {"pod-1"}
        async with target.session.get(f"{target.url}/metrics") as response:
            text = await response.text()
        assert 'pod="pod-1"' in text
        assert 'pod="pod-0"' not in text


async def test_a_reset_of_an_idle_engine_costs_a_few_wrong_predictions(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=1, scheduler=SCHEDULER) as target:
        await serve(target, 20)
        async with target.session.post(f"{target.engines[0].url}/reset_prefix_cache", json={}) as response:
            assert await response.json() == {"success": True}
        answers = await serve(target, 20)
        assert len(wrong(answers)) <= 1
        assert answers[0].cached == 0
        assert any(answer.cached for answer in answers)


async def test_a_gateway_that_restarts_learns_what_warm_engines_hold(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, replace(ENGINE, num_blocks=60, data_parallel_size=2), pods=2) as old:
        for prompt in prompts(60):
            await old.post(COMPLETIONS, body(prompt))
        async with gateway(old.engines, scheduler=SCHEDULER) as new:
            answers = await serve(new, 30)
            assert not wrong(answers)
            assert answers[0].cached > 0


async def test_a_truncated_history_predicts_less_and_never_more(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, replace(ENGINE, buffer_batches=5), pods=1) as old:
        for prompt in prompts(40):
            await old.post(COMPLETIONS, body(prompt))
        async with gateway(old.engines, scheduler=SCHEDULER) as new:
            answers = await serve(new, 30)
            assert all(answer.predicted <= answer.cached for answer in answers)
            assert new.service.engines.subscriber.feeds["pod-0"].state.value == "partial"
            assert wrong(answers[:10])


async def test_hits_reported_as_stored_make_predictions_wrong_by_at_most_a_block(tokenizer: LocalTokenizer) -> None:
    draw = random.Random(5)
    async with fleet(tokenizer, replace(ENGINE, num_blocks=60), pods=1, scheduler=SCHEDULER) as target:
        answers = []
        for prompt in prompts(150, families=8):
            await target.settled()
            more = FULL if draw.random() < 0.2 else {}
            answers.append(await target.ask(COMPLETIONS, body(prompt, **more)))
        assert target.service.engines.subscriber.feeds["pod-0"].ledger.stats.reported_again > 20
        assert {answer.predicted - answer.cached for answer in answers} <= {0, BLOCK}


async def test_false_blocks_left_by_hits_reported_as_stored_are_purged(
    tokenizer: LocalTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "_FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(drift, "SETTLE_SECONDS", 0.0)
    old = [[number] * (BLOCK + 1) for number in range(14)]  # hits of one block are taken for copies
    fresh = [[number] * (4 * BLOCK + 1) for number in range(100, 115)]
    async with fleet(tokenizer, replace(ENGINE, num_blocks=60), pods=1, scheduler=SCHEDULER) as target:
        for prompt in (*old, *fresh):
            await target.post(COMPLETIONS, body(prompt))
            await target.post(COMPLETIONS, body(prompt, **FULL))
            await target.settled()
        answers = []
        for prompt in old:
            await asyncio.sleep(0.05)
            answers.append(await target.ask(COMPLETIONS, body(prompt)))
        # First its history is fetched again, which reports the same blocks; then those blocks are dropped.
        assert await target.metric('matrixinfer_kv_resyncs_total{pod="pod-0"}') == 2
        assert [answer.predicted for answer in answers[:3]] == [BLOCK] * 3
        assert not wrong(answers[2 * drift.RUN :])
        assert not wrong(await serve(target, 60))


@pytest.mark.parametrize(("cpu_blocks", "bare"), [(60, False), (60, True), (1_000, False)])
async def test_blocks_on_the_cpu_are_predicted_also_where_events_only_name_them(
    tokenizer: LocalTokenizer, cpu_blocks: int, bare: bool
) -> None:
    tiers = replace(ENGINE, num_blocks=30, cpu_blocks=cpu_blocks, bare_cpu_events=bare)
    async with fleet(tokenizer, tiers, pods=1, scheduler=SCHEDULER) as target:
        assert not wrong(await serve(target, 100, families=6))
        assert target.engines[0].stats.loaded_tokens > 20 * BLOCK


async def test_predictions_are_never_too_high_where_tails_reach_the_cpu_before_their_heads(
    tokenizer: LocalTokenizer,
) -> None:
    tiers = replace(ENGINE, num_blocks=30, cpu_blocks=60, lazy_offload=True)
    async with fleet(tokenizer, tiers, pods=1, scheduler=SCHEDULER) as target:
        answers = await serve(target, 100, families=6)
        assert all(answer.predicted <= answer.cached for answer in answers)
        assert target.engines[0].stats.loaded_tokens > 20 * BLOCK
