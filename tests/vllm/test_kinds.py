"""Predicted hits equal reported hits for kinds of models, each on an engine whose cache soon evicts."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from . import workload
from .conftest import EngineFactory
from .engine import Engine, running
from .kinds import DROPPING, KINDS, Kind, make_kind, make_plugin, options_of
from .recording import Recording
from .results import Results, Tally
from .target import COMPLETIONS, Target, gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

COMPARED = 300
"""Requests compared of each kind, at least."""
RECORDED = 45
"""How many of them a recording holds."""


@pytest.mark.parametrize("name", KINDS)
async def test_hits_of_a_kind_of_model_are_predicted(
    name: str, make: EngineFactory, folder: Path, results: Results, version: str
) -> None:
    kind, draw, tally = KINDS[name], random.Random(name), results.of(name)
    drops = kind.drops_block and version in DROPPING
    model = make_kind(folder / "kinds" / name, kind)
    plugin = make_plugin(folder / "plugin")
    engine = make(1, options_of(kind, model, plugin), model=model)
    async with running(engine) as engines, gateway(engines, hashed=kind.block_size) as target:
        if drops:
            await _teach(target, results.of(f"{name}, before the drop is learnt"), draw, hashed=kind.block_size)
        async with _recorded(target, name, version, drops=drops) as recording_target:
            await workload.varied(recording_target, tally, draw, count=RECORDED, block=kind.block_size)
        await _ask_everything(target, tally, draw, kind)
        assert await target.probe.kinds("pod-0") == kind.attention
        ledger = target.feeds["pod-0"].ledger
        assert ledger.stats.removed, "nothing was evicted"
        assert bool(ledger.limits) != kind.is_exact, ledger.limits
        if drops:
            await _ask_in_larger_token_blocks(engines, results.of(f"{name}, hashed {4 * kind.block_size}"), draw, kind)
    assert tally.compared >= COMPARED
    # Where the feed has a limit, what was sent there lately counts beyond what the index says, and may be gone.
    assert (tally.over == 0 and tally.exact == tally.compared) or not kind.is_exact


async def _teach(target: Target, tally: Tally, draw: random.Random, *, hashed: int) -> None:
    """Ask for one prompt of whole token blocks until three hits have shown that the engine drops a block of each."""
    prompt = workload.few_ids(draw, 4 * hashed + 1)
    answers = [await target.ask(tally, COMPLETIONS, {"prompt": prompt}) for _ in range(6)]
    assert [answer.predicted == answer.cached for answer in answers] == [True, False, False, False, True, True]


async def _ask_in_larger_token_blocks(engines: Sequence[Engine], tally: Tally, draw: random.Random, kind: Kind) -> None:
    """Answers with more than predicted must not teach that nothing is dropped after all."""
    hashed = 4 * kind.block_size
    async with gateway(engines, hashed=hashed) as target:
        await _teach(target, Tally(), draw, hashed=hashed)
        await workload.varied(target, tally, draw, count=80, block=kind.block_size)
        assert target.feeds["pod-0"].ledger.drops
    assert tally.over == 0
    assert tally.largest_error < hashed


async def _ask_everything(target: Target, tally: Tally, draw: random.Random, kind: Kind) -> None:
    await workload.texts(target, tally, draw)
    if kind.renders:
        await workload.conversations(target, tally, draw)
    await workload.multiples(target, tally, draw, block=kind.block_size)
    await workload.aborts(target, tally, draw)
    await workload.varied(target, tally, draw, count=max(120, COMPARED - tally.compared), block=kind.block_size)


@asynccontextmanager
async def _recorded(target: Target, name: str, version: str, *, drops: bool) -> AsyncIterator[Target]:
    """The target, which records what it is asked in the folder RECORD, if that is set."""
    record = os.environ.get("RECORD")
    if not record:
        yield target
        return
    groups = {"use_eagle": True, "groups": [{"eagle": True}]} if drops else {}
    meta = {"note": f"vLLM {version} (CPU build), {name}, random weights", "version": {"version": version}, **groups}
    (endpoint,) = target.probe.endpoints.values()
    async with Recording(Path(record) / f"capture-{name}.jsonl.gz", endpoint, meta) as recording:
        yield replace(target, recording=recording)
