from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest

from matrixinfer.sim.cache import Adapter, PagedPrefixCache, Sequence
from matrixinfer.sim.cpu_tier import CpuTier
from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from matrixinfer.sim.model import EngineModel, EngineRequest, Timing

SIZE = 2
A, B = [1, 2, 3, 4], [5, 6, 7, 8]


def tiers(gpu: int, cpu: int, *, lazy: bool = True, bare: bool = False) -> PagedPrefixCache:
    return PagedPrefixCache(gpu + 1, SIZE, CpuTier(cpu, lazy=lazy, bare_events=bare))


def sequence(tokens: Iterable[int], adapter: Adapter | None = None) -> Sequence:
    return Sequence(np.array(list(tokens), dtype=np.uint32), SIZE, None, adapter)


def found(cache: PagedPrefixCache, tokens: Iterable[int]) -> tuple[int, int]:
    """Blocks on the GPU, and after them on the CPU."""
    asked = sequence(tokens)
    here = len(cache.lookup(asked))
    return here, cache.load(asked, here)


def run(cache: PagedPrefixCache, tokens: Iterable[int], adapter: Adapter | None = None) -> list[Event]:
    """Serve a prompt; what that changed."""
    held = sequence(tokens, adapter)
    hit = cache.lookup(held)
    cache.load(held, len(hit))
    assert cache.allocate(held, len(held.tokens), hit)
    cache.release(held)
    return cache.take_events()


def told(events: list[Event]) -> list[tuple[str, str, int]]:
    return [
        (type(event).__name__, event.medium, len(event.block_hashes))
        for event in events
        if not isinstance(event, AllBlocksCleared)
    ]


def test_what_leaves_the_gpu_stays_on_the_cpu_and_is_told_whole() -> None:
    cache = tiers(2, 8)
    (stored,) = run(cache, A, Adapter(1, "x"))
    events = run(cache, B)
    assert told(events) == [
        ("BlockStored", "CPU", 1),
        ("BlockRemoved", "GPU", 1),
        ("BlockStored", "CPU", 1),
        ("BlockRemoved", "GPU", 1),
        ("BlockStored", "GPU", 2),
    ]
    assert isinstance(stored, BlockStored)
    tail = events[0]
    assert isinstance(tail, BlockStored)
    assert (tail.block_hashes, tail.parent_block_hash) == (stored.block_hashes[1:], stored.block_hashes[0])
    assert (tail.token_ids, tail.block_size, tail.lora_name, tail.extra_keys) == ([3, 4], SIZE, "x", [("x",)])


def test_what_is_stored_on_the_gpu_is_copied_at_once_unless_that_is_lazy() -> None:
    cache = tiers(2, 8, lazy=False)
    stored, *copied = run(cache, A)
    assert isinstance(stored, BlockStored)
    assert told(copied) == [("BlockStored", "CPU", 1)] * 2
    assert [event.block_hashes[0] for event in copied if isinstance(event, BlockStored)] == stored.block_hashes
    assert told(run(cache, B))[:2] == [("BlockRemoved", "GPU", 1)] * 2
    assert found(cache, [*A, 0]) == (0, 2)


def test_a_prompts_tail_leaves_the_cpu_before_its_head() -> None:
    cache = tiers(2, 3, lazy=False)
    run(cache, A)
    run(cache, B)
    assert (found(cache, [*A, 0]), found(cache, [*B, 0])) == ((0, 1), (2, 0))


def test_blocks_come_back_and_are_stored_on_the_gpu_again() -> None:
    cache = tiers(2, 8)
    run(cache, A)
    run(cache, B)
    assert found(cache, [*A, 0]) == (0, 2)
    events = run(cache, A)
    assert told(events)[-1] == ("BlockStored", "GPU", 2)
    assert found(cache, [*A, 0]) == (2, 0)
    assert found(cache, [*B, 0]) == (0, 2)
    assert [event[0] for event in told(run(cache, B))] == ["BlockRemoved", "BlockRemoved", "BlockStored"]


def test_the_last_token_is_computed_whatever_is_held() -> None:
    cache = tiers(2, 8)
    run(cache, A)
    run(cache, B)
    assert found(cache, A) == (0, 1)


def test_the_least_recently_used_leaves_the_cpu_first() -> None:
    cache = tiers(2, 2)
    run(cache, A)
    run(cache, B)
    events = run(cache, [9, 10, 11, 12])
    gone = [event for event in events if isinstance(event, BlockRemoved) and event.medium == "CPU"]
    assert sum(len(event.block_hashes) for event in gone) == 2
    assert (found(cache, [*A, 0]), found(cache, [*B, 0])) == ((0, 0), (0, 2))


def test_a_copy_that_stays_on_the_gpu_is_not_kept_below() -> None:
    cache = tiers(4, 8)
    first, second = sequence(A[:2]), sequence(A[:2])
    for each in (first, second):
        assert cache.allocate(each, 2)
    cache.release(first)
    cache.take_events()
    held = sequence([*B, 9, 10])
    assert cache.allocate(held, 6)
    assert ("BlockRemoved", "GPU", 1) in told(events := cache.take_events())
    assert not any(isinstance(event, BlockStored) and event.medium == "CPU" for event in events)


def test_bare_events_name_blocks_without_tokens() -> None:
    cache = tiers(2, 8, bare=True)
    (stored,) = run(cache, A)
    (tail, *_) = run(cache, B)
    assert isinstance(tail, BlockStored)
    assert isinstance(stored, BlockStored)
    assert tail.block_hashes == stored.block_hashes[1:]
    assert (tail.token_ids, tail.block_size, tail.parent_block_hash, tail.extra_keys) == ([], 0, None, None)
    assert found(cache, [*A, 0]) == (0, 2)


def test_a_reset_clears_both_tiers() -> None:
    cache = tiers(2, 8)
    run(cache, A)
    run(cache, B)
    assert cache.reset()
    assert cache.take_events() == [AllBlocksCleared()]
    assert found(cache, [*A, 0]) == found(cache, [*B, 0]) == (0, 0)


@pytest.mark.parametrize("lazy", [False, True])
def test_events_tell_what_each_tier_holds(lazy: bool) -> None:
    draw = random.Random(1)
    cache = tiers(12, 10, lazy=lazy)
    held: dict[str, list[int]] = {"GPU": [], "CPU": []}
    prompts = [[draw.randrange(3) for _ in range(draw.randrange(2, 12))] for _ in range(40)]
    for _ in range(600):
        for event in run(cache, draw.choice(prompts)):
            assert not isinstance(event, AllBlocksCleared)
            for block in event.block_hashes:
                if isinstance(event, BlockStored):
                    held[event.medium].append(block)
                else:
                    held[event.medium].remove(block)
        asked = sequence([*draw.choice(prompts), 7])
        here = len(cache.lookup(asked))
        below = cache.load(asked, here)
        assert set(asked.hashes[:here]) <= set(held["GPU"])
        assert set(asked.hashes[here : here + below]) <= set(held["CPU"])
        rest = asked.hashes[here + below : (len(asked.tokens) - 1) // SIZE]
        assert not rest or rest[0] not in held["CPU"]
    assert len(held["CPU"]) == len(set(held["CPU"])) == 10


def test_loaded_blocks_count_as_cached_and_take_little_time() -> None:
    timing = Timing(step=1, prefill_token=0.1, decode_sequence=0, load_block=0.01)
    engine = EngineModel(tiers(3, 8), timing)
    steps = []
    for key, prompt in enumerate((A, B, [*A, 0])):
        engine.submit(EngineRequest(id=key, prompt=np.array(prompt, dtype=np.uint32), reply=[9]))
        steps.append(engine.step())
    assert [step.outputs[0].cached_tokens for step in steps] == [0, 0, 4]
    assert steps[2].duration == pytest.approx(1 + 1 * 0.1 + 1 * 0.01)
    assert (engine.stats.prefix_hits, engine.stats.loaded_tokens) == (2, 2)
