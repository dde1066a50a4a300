"""Predicted hits equal the hits that real engines report, for requests sent one at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from . import workload
from .conftest import ADAPTERS, EngineFactory
from .engine import NAME, Engine, Options, running
from .results import Results
from .target import COMPLETIONS, gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

OTHER_SIZES = (128,)
SUPPORT_BLOCKS_OF_16 = ("0.28.0",)
"""Versions with blocks of 16 tokens; later CPU builds require multiples of 32."""


async def test_hits_of_many_kinds_of_requests_are_predicted_exactly(
    engines: Sequence[Engine], results: Results
) -> None:
    draw, total = random.Random(1), 0
    async with gateway(engines) as target:
        for kind in (
            workload.texts,
            workload.conversations,
            workload.tools,
            workload.salts,
            workload.multiples,
            workload.aborts,
            workload.evictions,
        ):
            tally = results.of(kind.__name__)
            answers = await kind(target, tally, draw)
            assert tally.exact == tally.compared == len(answers)
            assert all(answer.predicted == answer.best for answer in answers), "another pod was warmer"
            assert any(answer.cached for answer in answers)
            total += len(answers)
        stats = [feed.ledger.stats for feed in target.feeds.values()]
        assert all(each.copies and each.removed for each in stats), "nothing was stored twice, or evicted"
    assert total >= 200


async def test_adapters_share_no_blocks_with_their_model_or_each_other(
    engines: Sequence[Engine], results: Results
) -> None:
    draw, tally = random.Random(2), results.of("adapters")
    seen: set[tuple[str, str | None]] = set()
    async with gateway(engines) as target:
        prompt = workload.text(draw, 200)
        for _ in range(40):
            model, salt = draw.choice((NAME, *ADAPTERS)), draw.choice((None, None, "s"))
            body = {"model": model, "prompt": prompt} | ({"cache_salt": salt} if salt else {})
            answer = await target.ask(tally, COMPLETIONS, body)
            assert (answer.cached > 0) == ((model, salt) in seen)
            seen.add((model, salt))
    assert len(seen) == 6
    assert tally.exact == tally.compared


@pytest.mark.parametrize("hashed", [16, 64, 128])
async def test_hashed_blocks_of_other_sizes_than_the_engines(
    engines: Sequence[Engine], results: Results, hashed: int
) -> None:
    draw, tally = random.Random(hashed), results.of(f"engine 32, hashed {hashed}")
    async with gateway(engines, hashed=hashed) as target:
        for _ in range(3):
            await workload.multiples(target, tally, draw)
        answers = await workload.evictions(target, tally, draw, count=30)
    assert any(answer.cached for answer in answers)
    assert tally.over == 0
    assert tally.largest_error <= max(0, hashed - 32)  # a match ends with a whole block of either size


async def test_engines_with_blocks_of_other_sizes(make: EngineFactory, results: Results, version: str) -> None:
    for size in OTHER_SIZES + ((16,) if version in SUPPORT_BLOCKS_OF_16 else ()):
        async with running(make(1, Options(block_size=size, blocks=12_800 // size))) as engines:
            for hashed in (16, 64, 128, 96):
                draw, tally = random.Random(hashed), results.of(f"engine {size}, hashed {hashed}")
                async with gateway(engines, hashed=hashed) as target:
                    await workload.multiples(target, tally, draw, block=size)
                    answers = await workload.evictions(target, tally, draw, count=30)
                assert any(answer.cached for answer in answers)
                assert tally.over == 0
                assert tally.largest_error <= max(0, hashed - size)
