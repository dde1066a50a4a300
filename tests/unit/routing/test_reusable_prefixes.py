"""Engines that do not reuse all that they hold: what is predicted for them, and what their answers teach."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from matrixinfer.config import ModelConfig
from matrixinfer.kvevents.limits import REUSES_LESS
from matrixinfer.trust.drop import RUN

from .recorded import MODEL, Gateway

BLOCK = 16
PROMPT = list(range(1000, 1000 + 12 * BLOCK))
PATH = "/v1/completions"


def event(group: int, kind: str, first: int, last: int, *, sparse: bool = False, **fields: Any) -> dict[str, Any]:
    """The blocks [first, last) of the prompt are stored; of a sparse event only the last one is named."""
    hashes = list(range(first + 1, last + 1))
    return {
        "type": "BlockStored",
        "block_hashes": hashes[-1:] if sparse else hashes,
        "parent_block_hash": first or None,
        "token_ids": PROMPT[first * BLOCK : last * BLOCK],
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(hashes),
        "group_idx": group,
        "kv_cache_spec_kind": kind,
        **fields,
    }


def removed(group: int, *blocks: int) -> dict[str, Any]:
    return {
        "type": "BlockRemoved",
        "block_hashes": [block + 1 for block in blocks],
        "medium": "GPU",
        "group_idx": group,
    }


class World(Gateway):
    """A gateway before one engine, `a`, whose blocks are smaller than the gateway's."""

    def __init__(self, block_size: int = 64) -> None:
        super().__init__(pods=("a", "b"), block_size=block_size, models=(ModelConfig(name=MODEL),))
        self.frames = 0

    def publish(self, *events: dict[str, Any]) -> None:
        self.feed("a").live(self.frames, msgspec.msgpack.encode([0.0, list(events)]))
        self.frames += 1

    async def predicted(self, tokens: int = len(PROMPT)) -> int:
        decision: Any = await self.parts.router.explain(PATH, self.body(tokens))
        hit: int = decision["pods"]["a"]["predicted_hit_tokens"]
        return hit

    async def ask(self, cached: int, tokens: int = len(PROMPT)) -> None:
        """A request that goes to `a`, whose answer reports so many cached tokens."""
        request = await self.dispatch(PATH, self.body(tokens))
        assert request.pod.name == "a"
        request.first_byte()
        request.usage(tokens, cached)
        await self.requests.finish(request)
        self.clock.now += 10
        self.parts.drift.doubts("a")  # what the answer says is judged when its events have come

    def body(self, tokens: int) -> bytes:
        return json.dumps({"model": MODEL, "prompt": PROMPT[:tokens]}).encode()


@pytest.mark.parametrize("block_size", [16, 64, 128, 48])
async def test_a_mamba_checkpoint_bounds_what_is_reused(block_size: int) -> None:
    world = World(block_size)
    world.publish(event(0, "full_attention", 0, 11), event(1, "mamba", 0, 7, sparse=True))
    assert await world.predicted() == 7 * BLOCK
    assert await world.predicted(7 * BLOCK) == 0
    world.publish(event(1, "mamba", 7, 10, sparse=True))
    assert await world.predicted() == 10 * BLOCK
    world.publish(removed(0, 8))
    assert await world.predicted() == 7 * BLOCK


async def test_a_window_must_be_held_where_the_prefix_ends() -> None:
    world = World()
    window: dict[str, Any] = {"kv_cache_spec_sliding_window": 2 * BLOCK + 1}
    world.publish(event(0, "full_attention", 0, 11), event(1, "sliding_window", 0, 11, **window))
    assert await world.predicted() == 11 * BLOCK
    world.publish(removed(1, 9))
    assert await world.predicted() == 9 * BLOCK
    world.publish({"type": "AllBlocksCleared"})
    assert await world.predicted() == 0


async def test_the_tokens_after_a_block_decide_where_events_say_so() -> None:
    world = World(BLOCK)
    ahead: dict[str, Any] = {"lookahead_token_ids": [[PROMPT[BLOCK * (n + 1)]] for n in range(3)] + [[7]]}
    world.publish(event(0, "full_attention", 0, 4, **ahead))
    assert await world.predicted() == 3 * BLOCK
    assert await world.predicted(3 * BLOCK + 1) == 3 * BLOCK
    assert await world.predicted(3 * BLOCK) == 2 * BLOCK


@pytest.mark.parametrize("kinds", [("full_attention",), ("full_attention", "mamba")])
async def test_a_block_drop_is_learnt_from_answers_and_taken_back(kinds: tuple[str, ...]) -> None:
    world, tokens = World(BLOCK), 9 * BLOCK + 5  # the prompt brings no further block
    world.publish(*(event(group, kind, 0, 9) for group, kind in enumerate(kinds)))
    assert await world.predicted(tokens) == 9 * BLOCK
    with capture_logs() as logs:
        for _ in range(RUN):
            await world.ask(8 * BLOCK, tokens)
        assert await world.predicted(tokens) == 8 * BLOCK
        for _ in range(RUN):
            await world.ask(9 * BLOCK, tokens)
    assert await world.predicted(tokens) == 9 * BLOCK
    learned = [line["tokens"] for line in logs if line["event"] == "block_drop_learned"]
    assert learned == [BLOCK, 0]
    assert not world.parts.drift.doubts("a")
    assert b"kv_resyncs_total{" not in world.parts.metrics.render()


@pytest.mark.parametrize("kinds", [("full_attention",), ("full_attention", "mamba")])
async def test_an_engine_that_reuses_less_than_its_events_say_is_predicted_by_its_answers(
    kinds: tuple[str, ...],
) -> None:
    world, tokens = World(BLOCK), 9 * BLOCK + 5
    world.publish(*(event(group, kind, 0, 9) for group, kind in enumerate(kinds)))
    for _ in range(40):
        await world.ask(3 * BLOCK, tokens)
    assert await world.predicted(tokens) == pytest.approx(3 * BLOCK, abs=3)
    decision: Any = await world.parts.router.explain(PATH, world.body(tokens))
    shown = decision["pods"]["a"]
    assert (shown["matched_blocks"], shown["trust"]) == (9, "partial")
    assert shown["reuse"] == pytest.approx(1 / 3, abs=0.02)
    assert shown["credit"] == pytest.approx(9 * shown["reuse"], abs=0.01)
    report: Any = world.parts.feed_reports.of(world.registry.pods[0])["a"]
    assert report["limits"] == [REUSES_LESS]
    assert world.parts.resyncs == ["a", "a"]
    for _ in range(40):
        await world.ask(9 * BLOCK, tokens)
    assert await world.predicted(tokens) == 9 * BLOCK
    assert world.feed("a").ledger.limits == ()


async def test_a_drop_is_learnt_for_good_where_token_blocks_are_larger_than_the_engines() -> None:
    world, drops = World(4 * BLOCK), BLOCK
    world.publish(event(0, "full_attention", 0, 12))
    short, middle, long = (4 * BLOCK + 5, 4 * BLOCK), (5 * BLOCK + 5, 5 * BLOCK), (7 * BLOCK + 5, 7 * BLOCK)
    for tokens, held in (middle, middle, middle, long, long, long, short, middle, short, long, short):
        await world.ask(held - drops, tokens)  # `short` alone shows the drop: the others are one token block and more
    assert await world.predicted(short[0]) == 3 * BLOCK
    for tokens, held in (middle, middle, middle, long, long, long, short, short, short):
        await world.ask(held - drops, tokens)
    assert await world.predicted(short[0]) == 3 * BLOCK
    assert not world.parts.drift.doubts("a")
    assert b"kv_resyncs_total{" not in world.parts.metrics.render()


async def test_the_longest_hit_of_a_prompt_shows_that_nothing_is_dropped() -> None:
    world, tokens = World(4 * BLOCK), 7 * BLOCK + 5
    world.publish(event(0, "full_attention", 0, 12))
    for _ in range(RUN):
        await world.ask(3 * BLOCK, 4 * BLOCK + 5)
    assert await world.predicted(tokens) == 3 * BLOCK
    for _ in range(RUN):
        await world.ask(7 * BLOCK, tokens)
    assert await world.predicted(tokens) == 4 * BLOCK
    for _ in range(RUN):
        await world.ask(7 * BLOCK, tokens)
    for _ in range(RUN):
        await world.ask(3 * BLOCK, 4 * BLOCK + 5)
    assert world.parts.resyncs == ["a"]


async def test_a_drop_that_answers_have_settled_explains_nothing_later() -> None:
    world, tokens = World(BLOCK), 9 * BLOCK + 5
    world.publish(event(0, "full_attention", 0, 9))
    for cached in (9, 9, 9, 8, 8, 8):
        await world.ask(cached * BLOCK, tokens)
    assert world.parts.resyncs == ["a"]


async def test_a_hit_of_one_block_that_was_not_found_is_drift() -> None:
    world, tokens = World(BLOCK), BLOCK + 5
    world.publish(event(0, "full_attention", 0, 1))
    for _ in range(RUN):
        await world.ask(0, tokens)
    assert world.parts.resyncs == ["a"]


async def test_other_differences_teach_nothing_and_count_as_drift() -> None:
    world = World(BLOCK)
    world.publish(event(0, "full_attention", 0, 9), event(1, "full_attention", 0, 9))
    for _ in range(RUN):
        await world.ask(3 * BLOCK)
    assert world.parts.resyncs == ["a"]


async def test_with_states_a_drop_is_tried_and_taken_back_when_it_explains_nothing() -> None:
    world = World(BLOCK)
    world.publish(event(0, "full_attention", 0, 9), event(1, "mamba", 0, 9))
    for _ in range(RUN):
        await world.ask(3 * BLOCK)
    assert world.feed("a").ledger.drops
    for _ in range(RUN):
        await world.ask(3 * BLOCK)
    assert not world.feed("a").ledger.drops
    assert world.parts.resyncs == []
    for _ in range(RUN):
        await world.ask(3 * BLOCK)
    assert world.parts.resyncs == ["a"]
