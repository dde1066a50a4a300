"""Each loss on the ladder, provoked once on simulated engines, and `matrixinfer explain --ladder`, which shows it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from matrixinfer.cli import main
from matrixinfer.config import SchedulerConfig
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.sim.config import SimEngineConfig

from .fleet import Fleet, fleet

COMPLETIONS = "/v1/completions"
ENGINE = SimEngineConfig(model="m", block_size=16, num_blocks=5_000)
TOKENS = 641
"""Of each prompt: five token blocks, and one token that is never reused."""
UNSHADOWED = SchedulerConfig(pending_seconds=0.01)
"""Lets no prompt count as cached for some time after its answer, whatever the events say."""


async def send(gateway: Fleet, prompts: Sequence[int]) -> None:
    """Send prompts one after the other. Each number stands for a prompt of its own."""
    for number in prompts:
        prompt = [number * 1_000 + position for position in range(TOKENS)]
        await gateway.post(COMPLETIONS, {"model": "m", "prompt": prompt, "max_tokens": 1})
        await gateway.settled()


async def ladder_of(gateway: Fleet) -> dict[str, Any]:
    async with gateway.session.get(f"{gateway.service.gateway.admin_url}/debug/ladder?since=600") as response:
        assert response.status == 200
        found: dict[str, Any] = (await response.json())["ladder"]
        return found


def losses(ladder: dict[str, Any]) -> dict[str, int]:
    return {loss["name"]: loss["tokens"] for rung in ladder["rungs"] for loss in rung["losses"]}


def tokens(ladder: dict[str, Any]) -> list[int | None]:
    return [rung["tokens"] for rung in ladder["rungs"]]


async def explain(gateway: Fleet, *arguments: str) -> int:
    return await asyncio.to_thread(main, ["explain", "--admin", gateway.service.gateway.admin_url or "", *arguments])


async def test_without_a_loss_everything_that_came_before_is_reused(
    tokenizer: LocalTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with fleet(tokenizer, ENGINE, pods=2) as gateway:
        await gateway.settled()
        await send(gateway, [1, 2, 1, 2])
        ladder = await ladder_of(gateway)
        assert tokens(ladder) == [2 * 640] * 5
        assert losses(ladder) == {"new": 2 * 640, "ends": 4}
        assert ladder["capacity_tokens"] == 2 * 5_000 * 16
        assert (ladder["requests"], ladder["reported_requests"], ladder["error_share"]) == (4, 4, 0.0)

        assert await explain(gateway, "--ladder", "--since", "5m") == 0
        shown = capsys.readouterr().out
        assert "4 requests with 2,564 prompt tokens" in shown
        assert "49.9% new: content that no earlier prompt had" in shown
        assert await explain(gateway, "--ladder", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"since_seconds": 3_600, "ladder": ladder}


async def test_small_caches_lose_to_eviction(tokenizer: LocalTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(ENGINE, num_blocks=60)
    async with fleet(tokenizer, small, pods=2, scheduler=UNSHADOWED) as gateway:
        await gateway.settled()
        await send(gateway, [1, 2, 3, 4, 5, 6] * 2)
        ladder = await ladder_of(gateway)
        lost = losses(ladder)
        assert lost["new"] == 6 * 640
        assert lost["evicted"] > 4 * 640
        capacity = ladder["rungs"][1]
        assert capacity["name"] == "capacity"
        assert capacity["tokens"] == 6 * 640 - lost["evicted"]
        assert "more KV tokens" in capacity["remedy"]

        assert await explain(gateway, "--ladder") == 0
        assert "evicted: the fleet's caches are too small" in capsys.readouterr().out


async def test_routing_that_does_not_look_at_caches_loses_to_the_profile(tokenizer: LocalTokenizer) -> None:
    scheduler = with_policy(SchedulerConfig(), "round_robin")
    async with fleet(tokenizer, ENGINE, pods=2, scheduler=scheduler) as gateway:
        await gateway.settled()
        await send(gateway, [1, 2, 3, 1, 2, 3])
        ladder = await ladder_of(gateway)
        assert losses(ladder) == {"new": 3 * 640, "scored": 3 * 640, "ends": 6}
        assert tokens(ladder) == [3 * 640, 3 * 640, 3 * 640, 0, 0]


async def test_a_pod_that_was_emptied_is_told_from_one_that_is_too_small(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=1, scheduler=UNSHADOWED) as gateway:
        await gateway.settled()
        await send(gateway, [1])
        async with gateway.session.post(f"{gateway.engines[0].url}/reset_prefix_cache") as response:
            assert response.status == 200
        await send(gateway, [2])  # the engine says with its next step that it was emptied
        await asyncio.sleep(0.02)  # until no block is pending any more
        await send(gateway, [1])
        ladder = await ladder_of(gateway)
        assert losses(ladder) == {"new": 2 * 640, "emptied": 640, "ends": 3}


async def test_replies_count_as_seen_before(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=1) as gateway:
        await gateway.settled()
        await send(gateway, [1])
        prompt = list(range(TOKENS))
        chat = {"model": "m", "prompt": prompt, "max_tokens": 200, "return_token_ids": True, "ignore_eos": True}
        answer, _ = await gateway.post(COMPLETIONS, chat)
        await gateway.settled()
        assert answer["usage"]["completion_tokens"] == 200
        assert len(gateway.service.state.ladder) == 5 + (TOKENS + 199) // 128


async def test_a_gateway_without_requests_says_so_and_refuses_times_that_are_none(
    tokenizer: LocalTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with fleet(tokenizer, ENGINE, pods=1) as gateway:
        assert await explain(gateway, "--ladder") == 0
        assert capsys.readouterr().out.endswith("no request has ended in that time\n")
        assert await explain(gateway, "--ladder", "some-id") == 2
        assert await explain(gateway, "--since", "1h") == 2
        assert await gateway.metric('matrixinfer_ladder_tokens_total{rung="prompt"}') == 0.0
        async with gateway.session.get(f"{gateway.service.gateway.admin_url}/debug/ladder?since=999999999") as response:
            assert (await response.json())["since_seconds"] == 86_400
        for since in ("0", "x", "-1", "1.5", "", "9" * 10):
            url = f"{gateway.service.gateway.admin_url}/debug/ladder?since={since}"
            async with gateway.session.get(url) as response:
                assert response.status == 400
                assert (await response.json())["error"]["message"].startswith("since: expected a number")
