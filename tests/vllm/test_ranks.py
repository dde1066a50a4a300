"""Data-parallel ranks of a real engine: each is a cache of its own, and the gateway chooses among them."""

from __future__ import annotations

import random

import pytest

from . import workload
from .conftest import Makers
from .engine import Options, running
from .results import Results
from .target import COMPLETIONS, gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_rank_that_is_chosen_is_the_one_that_answers(make: Makers, results: Results) -> None:
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
