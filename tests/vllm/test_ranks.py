"""Data-parallel ranks of a real engine: each has its own cache, and the gateway chooses a rank."""

from __future__ import annotations

import random

import pytest

from . import workload
from .conftest import EngineFactory
from .engine import NAME, Options, running
from .results import Results
from .target import COMPLETIONS, gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")


WITHOUT_SOURCES = ("0.28.0",)
"""Versions that do not report where their ranks publish (`/kv_event_sources`)."""


async def test_the_chosen_rank_answers(make: EngineFactory, results: Results, version: str) -> None:
    if version in WITHOUT_SOURCES:
        await _is_routed_by_load(make)
        return
    draw, tally = random.Random(5), results.of("two ranks")
    async with running(make(1, Options(ranks=2))) as engines, gateway(engines) as target:
        assert set(target.feeds) == {"pod-0@dp0", "pod-0@dp1"}
        prefixes = [workload.ids(draw, 600) for _ in range(8)]
        home: dict[int, str] = {}
        for turn in range(80):
            number = turn % 8 if turn < 8 else draw.randrange(8)
            prompt = [*prefixes[number], *workload.ids(draw, draw.randrange(1, 100))]
            answer = await target.ask(tally, COMPLETIONS, {"prompt": prompt})
            assert home.setdefault(number, answer.endpoint) == answer.endpoint
        await workload.multiples(target, tally, draw)
        assert set(home.values()) == set(target.feeds)
    assert tally.exact == tally.compared


async def _is_routed_by_load(make: EngineFactory) -> None:
    """Without event sources nothing is predicted, and every request is answered."""
    draw = random.Random(6)
    async with running(make(1, Options(ranks=2))) as engines, gateway(engines, followed=0) as target:
        for _ in range(10):
            body = {"model": NAME, "prompt": workload.ids(draw, 200), "max_tokens": 4}
            for _ in range(2):
                assert (await target.explain(COMPLETIONS, body))["pods"]["pod-0"]["matched_blocks"] is None
                async with target.session.post(target.service.gateway.url + COMPLETIONS, json=body) as response:
                    assert response.status == 200
        assert not target.feeds
