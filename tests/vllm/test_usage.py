"""Streams that do not request usage, and engines that do not report hits."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence

import pytest

from matrixinfer.kvevents import subscription

from . import workload
from .conftest import EngineFactory
from .counter import Counter
from .engine import NAME, Engine, Options, running
from .relay import relay
from .results import Results
from .target import CHAT, COMPLETIONS, Json, Target, gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def chunks_of(target: Target, url: str, body: Json) -> tuple[list[Json], str | None]:
    """The chunks of a stream as the client sees them, and the request id of the gateway."""
    async with target.session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        *events, last, end = (await response.text()).split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events], response.headers.get("x-request-id")


def keys_of(chunks: list[Json]) -> set[frozenset[str]]:
    """The keys of chunks whose values are not null, without `system_fingerprint`, which is in the chunk with usage."""
    return {frozenset(key for key in chunk if chunk[key] is not None) - {"system_fingerprint"} for chunk in chunks}


async def test_usage_that_a_client_did_not_request_is_read_and_removed(
    engines: Sequence[Engine], results: Results
) -> None:
    draw, tally = random.Random(21), results.of("streams without usage")
    async with gateway(engines, injects_usage=True) as target:
        for number in range(20):
            words = workload.text(draw, draw.randrange(50, 200))
            path = (CHAT, COMPLETIONS)[number % 2]
            asked: Json = {"prompt": words} if number % 2 else {"messages": [{"role": "user", "content": words}]}
            body = {"model": NAME, "temperature": 0, "max_tokens": 6, "stream": True, **asked}
            bare, _ = await chunks_of(target, engines[0].url + path, body)
            for options in (None, {"include_usage": False}, {"include_usage": True}):
                await target.wait_for_events()
                chunks, request = await chunks_of(
                    target, target.service.gateway.url + path, body | ({"stream_options": options} if options else {})
                )
                assert request is not None
                outcome = target.recorded(request)
                tally.add(outcome.predicted, outcome.cached)
                if options == {"include_usage": True}:
                    assert chunks[-1]["choices"] == []
                    assert chunks[-1]["usage"]["prompt_tokens"] > 0
                else:
                    assert all(chunk["choices"] and not chunk.get("usage") for chunk in chunks)
                    assert keys_of(chunks) == keys_of(bare)
            assert outcome.cached > 0
    assert tally.exact == tally.compared


async def test_drift_of_an_engine_without_usage_is_found_by_its_hit_counter(
    make: EngineFactory, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "HEARTBEAT_SECONDS", 600.0)  # a heartbeat would find the emptied frame
    draw = random.Random(22)
    during, after = results.of("no cached tokens reported: a missed reset"), results.of("the same, after correction")
    prompts = [workload.ids(draw, 400) for _ in range(28)]
    async with (
        running(make(1, Options(reports_cached=False))) as engines,
        relay(engines[0].events, seed=2) as between,
        gateway(engines, events={0: between.endpoint}, injects_usage=True) as target,
    ):
        counter = Counter(target, engines[0])
        for prompt in prompts:
            assert await counter.ask(after, prompt) == (0, 0)
        between.empties = True
        await counter.reset()
        await counter.ask(after, workload.ids(draw, 300))  # the engine publishes the reset together with these blocks
        await target.wait_for_events()
        assert between.emptied > 0
        between.empties = False
        left = iter(prompts)
        while not await target.metric("matrixinfer_kv_resyncs_total"):
            assert await counter.ask(during, next(left)) == (384, 0)
            await asyncio.sleep(0.8)
        await target.wait_for_complete_feeds(1)
        assert await target.metric("matrixinfer_drift_windows_total", 'result="short"') >= 3
        assert await target.metric("matrixinfer_drift_total") == 0, "no answer has reported cached tokens"
        for prompt in (*left, *prompts):
            await counter.ask(after, prompt)
    assert during.exact == 0
    assert after.exact == after.compared > len(prompts)
