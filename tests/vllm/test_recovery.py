"""Failures of real engines and of the network. Afterwards, predictions are exact again."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence

import aiohttp
import pytest

from matrixinfer.kvevents import subscription
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.trust import drift
from tests.waiting import eventually

from . import workload
from .engine import Engine
from .relay import relay
from .results import Results
from .target import COMPLETIONS, gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

FULL = {"vllm_xargs": {"kv_cache_report_mode": "full"}}
"""With this, vLLM reports the blocks that a request found as if they were stored again."""


def has_answered(feed: PodFeed) -> Callable[[], bool]:
    """A condition: from now on, the engine has confirmed twice that nothing was lost."""
    before = feed.stats.heartbeats
    return lambda: feed.stats.heartbeats > before + 1 and feed.state is FeedState.COMPLETE


async def test_an_engine_that_is_killed_and_restarted(engines: Sequence[Engine], results: Results) -> None:
    draw, tally = random.Random(11), results.of("engine killed and restarted")
    async with gateway(engines) as target:
        await workload.evictions(target, tally, draw, count=25)
        await engines[0].stop(signal.SIGKILL)
        for _ in range(20):  # none of them fails
            async with target.session.post(
                target.service.gateway.url + COMPLETIONS,
                json={"model": "tiny", "prompt": workload.ids(draw, 100), "max_tokens": 1},
            ) as response:
                assert response.status == 200
                assert response.headers["x-matrixinfer-pod"] == "pod-1"
        await engines[0].start()
        feed = target.feeds["pod-0"]
        # It has replayed frames before, so a replay of nothing says that it has published nothing yet.
        await eventually(lambda: (feed.state, feed.stats.restarts) == (FeedState.COMPLETE, 1))
        await eventually(lambda: all(pod.healthy for pod in target.service.engines.registry.pods))
        assert len(feed.ledger) == 0
        answers = await workload.evictions(target, tally, draw, count=40)
        assert {answer.endpoint for answer in answers} == {"pod-0", "pod-1"}
        await target.wait_for_complete_feeds(2)
    assert tally.exact == tally.compared


async def test_a_gateway_that_starts_with_warm_engines(engines: Sequence[Engine], results: Results) -> None:
    draw, tally = random.Random(12), results.of("gateway restarted")
    prompts = [workload.ids(draw, 500) for _ in range(6)]
    async with gateway(engines) as target:
        homes = [(await target.ask(tally, COMPLETIONS, {"prompt": prompt})).endpoint for prompt in prompts]
    async with gateway(engines) as target:
        for prompt, home in zip(prompts, homes, strict=True):
            answer = await target.ask(tally, COMPLETIONS, {"prompt": prompt})
            assert (answer.endpoint, answer.cached) == (home, 480)
        await workload.evictions(target, tally, draw, count=25)
    assert tally.exact == tally.compared


async def test_frames_that_are_lost(
    engines: Sequence[Engine], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "HEARTBEAT_SECONDS", 0.5)
    draw, tally = random.Random(13), results.of("frames lost")
    async with relay(engines[0].events, seed=1) as lossy, gateway(engines, events={0: lossy.endpoint}) as target:
        feed = target.feeds["pod-0"]
        for _ in range(3):
            lossy.share = 0.3
            for _ in range(15):
                prompt = workload.ids(draw, draw.randrange(100, 900))
                await target.session.post(
                    target.service.gateway.url + COMPLETIONS, json={"model": "tiny", "prompt": prompt, "max_tokens": 40}
                )
            lossy.share = 0.0
            await eventually(has_answered(feed))
            await workload.evictions(target, tally, draw, count=22)
        assert lossy.lost > 10
        assert feed.stats.gaps + feed.stats.silent_losses > 0
    assert tally.exact == tally.compared


async def test_a_cache_that_is_reset_while_the_engine_is_idle(engines: Sequence[Engine], results: Results) -> None:
    draw, before, tally = random.Random(14), results.of("before the reset"), results.of("cache reset while idle")
    async with gateway(engines) as target:
        prompts = [workload.ids(draw, 400) for _ in range(8)]
        for prompt in prompts:
            await target.ask(before, COMPLETIONS, {"prompt": prompt})
        for engine in engines:
            async with aiohttp.ClientSession() as session, session.post(f"{engine.url}/reset_prefix_cache") as response:
                assert response.status == 200
        assert before.exact == before.compared
        answers = [await target.ask(tally, COMPLETIONS, {"prompt": prompt}) for prompt in prompts]
        wrong = [answer.endpoint for answer in answers if answer.predicted != answer.cached]
        assert len(wrong) == len(set(wrong)) <= 2, "more than the first request at an engine"
        assert all(answer.cached == 0 for answer in answers)
        again = [await target.ask(tally, COMPLETIONS, {"prompt": prompt}) for prompt in prompts]
        assert all(answer.cached == answer.predicted == 384 for answer in again)


async def test_hits_that_are_reported_as_new_blocks(
    engines: Sequence[Engine], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "_FIRST_PAUSE_SECONDS", 0.5)
    draw = random.Random(15)
    during, after = results.of("hits reported as new blocks"), results.of("after their correction")
    async with gateway(engines) as target:
        prefixes = [workload.ids(draw, draw.randrange(800, 2400)) for _ in range(20)]
        for _ in range(120):
            prefix = draw.choice(prefixes)
            prompt = [*prefix[: draw.randrange(len(prefix) // 2, len(prefix))], *workload.ids(draw, 50)]
            options = FULL if draw.random() < 0.2 else {}
            await target.ask(during, COMPLETIONS, {"prompt": prompt, **options})
        assert all(feed.ledger.stats.reported_again for feed in target.feeds.values())
        exact = 0
        for _ in range(150):  # wrong claims are detected one by one
            before = after.exact
            prefix = draw.choice(prefixes)
            await target.ask(after, COMPLETIONS, {"prompt": [*prefix, *workload.ids(draw, 50)]})
            exact = exact + 1 if after.exact > before else 0
            if exact == 40:
                break
        assert exact == 40
        if during.over:
            assert await target.metric("matrixinfer_kv_resyncs_total") > 0


async def test_one_block_hits_reported_as_new_count_as_copies_until_answers_disagree(
    engines: Sequence[Engine], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "_FIRST_PAUSE_SECONDS", 0.5)
    draw = random.Random(16)
    during, after = results.of("one-block hits reported as new"), results.of("after their detection")
    prompts = [workload.ids(draw, 40) for _ in range(40)]
    async with gateway(engines) as target:
        for prompt in prompts:
            for options in ({}, FULL, FULL):
                await target.ask(during, COMPLETIONS, {"prompt": prompt, **options})
        assert during.exact == during.compared
        for _ in range(40):  # more than the caches hold
            await target.ask(during, COMPLETIONS, {"prompt": workload.ids(draw, 1200)})
        for prompt in prompts:
            await target.ask(during, COMPLETIONS, {"prompt": prompt})
        assert during.over > 0
        assert await target.metric("matrixinfer_kv_resyncs_total") > 0
        for prompt in prompts:
            await target.ask(after, COMPLETIONS, {"prompt": [*prompt, *workload.ids(draw, 300)]})
    assert after.over == 0
