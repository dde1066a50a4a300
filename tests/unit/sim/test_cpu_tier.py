from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest

from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.cpu_tier import CpuTier
from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from matrixinfer.sim.model import EngineModel, EngineRequest, Timing
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.sequence import Sequence

SIZE = 2
A, B = [1, 2, 3, 4], [5, 6, 7, 8]


def tiers(gpu: int, cpu: int, *, lazy: bool = True, bare: bool = False) -> PagedPrefixCache:
    return PagedPrefixCache(gpu + 1, SIZE, CpuTier(cpu, lazy=lazy, bare_events=bare))


def sequence(tokens: Iterable[int], adapter: Adapter | None = None) -> Sequence:
    return Sequence(np.array(list(tokens), dtype=np.uint32), SIZE, None, adapter)


def found(cache: PagedPrefixCache, tokens: Iterable[int]) -> tuple[int, int]:
    """Blocks that are found on the GPU, and then on the CPU."""
    prompt = sequence(tokens)
    on_gpu = cache.lookup(prompt)
    return len(on_gpu.blocks[0]), cache.load(prompt, on_gpu) // SIZE


def run(cache: PagedPrefixCache, tokens: Iterable[int], adapter: Adapter | None = None) -> list[Event]:
    """Serve a prompt and return the events."""
    held = sequence(tokens, adapter)
    hit = cache.lookup(held)
    cache.load(held, hit)
    assert cache.allocate(held, len(held.tokens), hit)
    cache.release(held)
    return cache.take_events()


def changes(events: list[Event]) -> list[tuple[str, str, int]]:
    return [
        (type(event).__name__, event.medium, len(event.block_hashes))
        for event in events
        if not isinstance(event, AllBlocksCleared)
    ]


def test_evicted_blocks_stay_on_the_cpu_with_complete_events() -> None:
    cache = tiers(2, 8)
    (stored,) = run(cache, A, Adapter(1, "x"))
    events = run(cache, B)
    assert changes(events) == [
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


def test_stored_blocks_are_copied_at_once_unless_lazy() -> None:
    cache = tiers(2, 8, lazy=False)
    stored, *copied = run(cache, A)
    assert isinstance(stored, BlockStored)
    assert changes(copied) == [("BlockStored", "CPU", 1)] * 2
    assert [event.block_hashes[0] for event in copied if isinstance(event, BlockStored)] == stored.block_hashes
    assert changes(run(cache, B))[:2] == [("BlockRemoved", "GPU", 1)] * 2
    assert found(cache, [*A, 0]) == (0, 2)


def test_a_prompts_tail_leaves_the_cpu_before_its_head() -> None:
    cache = tiers(2, 3, lazy=False)
    run(cache, A)
    run(cache, B)
    assert (found(cache, [*A, 0]), found(cache, [*B, 0])) == ((0, 1), (2, 0))


def test_blocks_are_loaded_back_to_the_gpu() -> None:
    cache = tiers(2, 8)
    run(cache, A)
    run(cache, B)
    assert found(cache, [*A, 0]) == (0, 2)
    events = run(cache, A)
    assert changes(events)[-1] == ("BlockStored", "GPU", 2)
    assert found(cache, [*A, 0]) == (2, 0)
    assert found(cache, [*B, 0]) == (0, 2)
    assert [event[0] for event in changes(run(cache, B))] == ["BlockRemoved", "BlockRemoved", "BlockStored"]


def test_the_last_token_is_always_computed() -> None:
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


def test_a_block_is_copied_only_when_its_last_copy_leaves_the_gpu() -> None:
    cache = tiers(4, 8)
    first, second = sequence(A[:2]), sequence(A[:2])
    for each in (first, second):
        assert cache.allocate(each, 2)
    cache.release(first)
    cache.take_events()
    held = sequence([*B, 9, 10])
    assert cache.allocate(held, 6)
    assert ("BlockRemoved", "GPU", 1) in changes(events := cache.take_events())
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
def test_events_report_what_each_tier_holds(lazy: bool) -> None:
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
        prompt = sequence([*draw.choice(prompts), 7])
        hit = cache.lookup(prompt)
        on_gpu, on_cpu = len(hit.blocks[0]), cache.load(prompt, hit) // SIZE
        assert set(prompt.hashes[:on_gpu]) <= set(held["GPU"])
        assert set(prompt.hashes[on_gpu : on_gpu + on_cpu]) <= set(held["CPU"])
        rest = prompt.hashes[on_gpu + on_cpu : (len(prompt.tokens) - 1) // SIZE]
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
