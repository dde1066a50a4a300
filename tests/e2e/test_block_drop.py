"""Engines that drop a block of every hit, which no event says: answers teach the gateway, whatever kinds of attention there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from matrixinfer.prompt.local import LocalTokenizer

from .fleet import fleet
from .test_failures import ENGINE, SCHEDULER, serve, wrong

HYBRIDS = {
    "full and windows": ("full", "sliding:64"),
    "full and states": ("full", "mamba"),
    "MLA and windows": ("mla", "sliding_mla:64"),
    "full alone": ("full",),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kinds", HYBRIDS)
async def test_a_block_drop_is_learnt_from_answers(tokenizer: LocalTokenizer, kinds: str, seed: int) -> None:
    engine = replace(ENGINE, attention=HYBRIDS[kinds], speculative="drop", num_blocks=400)
    async with fleet(tokenizer, engine, pods=1, scheduler=SCHEDULER) as target:
        answers = await serve(target, 80, seed=seed, families=6, length=8)
        late = answers[30:]
        print(kinds, seed, [answer.predicted - answer.cached for answer in answers])
        assert sum(answer.cached for answer in late) > 0
        assert not wrong(late)
        assert target.service.engines.subscriber.feeds["pod-0"].ledger.drops


@pytest.mark.parametrize("kinds", HYBRIDS)
async def test_engines_that_drop_nothing_are_not_taken_for_such(tokenizer: LocalTokenizer, kinds: str) -> None:
    engine = replace(ENGINE, attention=HYBRIDS[kinds], num_blocks=60)
    async with fleet(tokenizer, engine, pods=1, scheduler=SCHEDULER) as target:
        assert not wrong(await serve(target, 80, families=6))
        assert not target.service.engines.subscriber.feeds["pod-0"].ledger.drops
