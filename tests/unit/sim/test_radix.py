from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np
import pytest

from matrixinfer.sim.model import EngineModel, EngineRequest, Timing
from matrixinfer.sim.page_sequence import PageSequence
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.radix import RadixCache
from matrixinfer.sim.radix_events import AllBlocksCleared, BlockRemoved, BlockStored

SIZE = 2


def sequence(cache: RadixCache, tokens: Iterable[int], *namespace: object) -> PageSequence:
    return cache.sequence(np.array(list(tokens), dtype=np.uint32), *namespace)  # type: ignore[arg-type]


def begin(cache: RadixCache, tokens: Iterable[int], *namespace: object) -> PageSequence:
    """Compute a prompt."""
    held = sequence(cache, tokens, *namespace)
    assert cache.allocate(held, len(held.tokens), cache.lookup(held))
    cache.computed(held, len(held.tokens))
    return held


def serve(cache: RadixCache, tokens: Iterable[int], *namespace: object) -> None:
    cache.release(begin(cache, tokens, *namespace))


def hit(cache: RadixCache, tokens: Iterable[int], *namespace: object) -> int:
    return cache.lookup(sequence(cache, tokens, *namespace)).tokens


def stored(cache: RadixCache) -> list[BlockStored]:
    return [event for event in cache.take_events() if isinstance(event, BlockStored)]


def test_a_new_cache_says_that_it_is_empty() -> None:
    cache = RadixCache(8, SIZE)
    assert cache.take_events() == [AllBlocksCleared()]
    assert cache.take_events() == []


def test_a_repeated_prompt_hits_all_but_its_last_token_and_stores_nothing() -> None:
    cache = RadixCache(16, SIZE)
    serve(cache, [1, 2, 3, 4])
    assert hit(cache, [1, 2, 3, 4]) == 2
    assert hit(cache, [1, 2, 3, 4, 5]) == 4
    assert hit(cache, [9, 2, 3, 4, 5]) == 0
    cache.take_events()
    serve(cache, [1, 2, 3, 4])
    assert cache.take_events() == []
    assert cache.usage == 0


def test_events_are_maps_without_nil_fields_with_signed_hashes_and_several_pages() -> None:
    cache = RadixCache(64, SIZE)
    for number in range(5):
        serve(cache, [number, 2, 3, 4, 5], "s" if number == 4 else None)
    events = stored(cache)
    assert [len(event.block_hashes) for event in events] == [2] * 5
    assert min(block for event in events for block in event.block_hashes) < 0
    plain, salted = (msgspec.to_builtins(event) for event in (events[0], events[4]))
    assert list(plain) == [
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
    ]
    assert (plain["parent_block_hash"], plain["token_ids"], plain["lora_id"]) == (None, [0, 2, 3, 4], None)
    assert list(salted) == [*plain, "cache_salt"]


def test_pages_that_continue_the_last_event_are_appended_to_it() -> None:
    cache = RadixCache(16, SIZE)
    held = sequence(cache, [1, 2, 3, 4, 5, 6])
    cache.take_events()
    for computed in (3, 6):
        assert cache.allocate(held, computed, cache.lookup(held) if computed == 3 else None)
        cache.computed(held, computed)
    (event,) = stored(cache)
    assert (event.block_hashes, event.token_ids) == (held.hashes, [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("namespace", [("a",), (None, Adapter(1, "french")), (None, None, "key")])
def test_salts_adapters_and_extra_keys_share_no_pages(namespace: tuple[object, ...]) -> None:
    cache = RadixCache(16, SIZE)
    serve(cache, [1, 2, 3, 4, 5])
    assert hit(cache, [1, 2, 3, 4, 5], *namespace) == 0
    serve(cache, [1, 2, 3, 4, 5], *namespace)
    assert hit(cache, [1, 2, 3, 4, 5], *namespace) == 4
    plain, other = stored(cache)
    # An `extra_key` is in no event.
    assert (plain.block_hashes == other.block_hashes) == (len(namespace) == 3)
    assert [plain.lora_name, other.lora_name] == [None, "french" if namespace[1:] == (Adapter(1, "french"),) else None]


def test_a_reply_enters_the_tree_when_the_request_ends() -> None:
    cache = RadixCache(16, SIZE)
    held = begin(cache, [1, 2, 3])
    held.append(4)
    assert cache.allocate(held, 4)
    cache.computed(held, 4)
    assert hit(cache, [1, 2, 3, 4, 5]) == 2
    cache.take_events()
    cache.release(held)
    (event,) = stored(cache)
    assert (event.token_ids, event.parent_block_hash) == ([3, 4], held.hashes[0])
    assert hit(cache, [1, 2, 3, 4, 5]) == 4


def test_a_preempted_reply_is_not_kept() -> None:
    cache = RadixCache(16, SIZE)
    held = begin(cache, [1, 2, 3])
    held.append(4)
    assert cache.allocate(held, 4)
    cache.computed(held, 4)
    cache.release(held, preempted=True)
    assert (hit(cache, [1, 2, 3, 4, 5]), cache.usage) == (2, 0)


def test_the_least_recently_used_leaf_goes_first_and_whole() -> None:
    cache = RadixCache(6, SIZE)
    serve(cache, [1, 2, 3, 4])
    serve(cache, [5, 6, 7, 8])
    hit(cache, [1, 2, 3, 4, 0])
    cache.take_events()
    begin(cache, [90, 91, 92, 93, 94, 95])
    (removed, _) = cache.take_events()
    assert isinstance(removed, BlockRemoved)
    assert len(removed.block_hashes) == 2
    assert (hit(cache, [1, 2, 3, 4, 0]), hit(cache, [5, 6, 7, 8, 0])) == (4, 0)


def test_a_split_node_loses_its_tail_before_its_head() -> None:
    cache = RadixCache(6, SIZE)
    serve(cache, [1, 2, 3, 4, 5, 6])
    hit(cache, [1, 2, 9])
    begin(cache, [90, 91, 92, 93, 94, 95, 96, 97])
    assert hit(cache, [1, 2, 3, 4, 5, 6, 0]) == 2


def test_pages_in_use_are_never_evicted_and_prevent_a_reset() -> None:
    cache = RadixCache(3, SIZE)
    held = begin(cache, [1, 2, 3, 4])
    late = sequence(cache, [5, 6, 7, 8])
    found = cache.lookup(late)
    assert not cache.fits(late, found)
    assert not cache.allocate(late, 4, found)
    assert hit(cache, [1, 2, 3, 4, 0]) == 4
    assert not cache.reset()
    cache.release(held)
    cache.take_events()
    assert cache.reset()
    assert cache.take_events() == [AllBlocksCleared()]
    assert hit(cache, [1, 2, 3, 4, 0]) == 0


def test_pages_of_pairs_need_the_token_after_them() -> None:
    cache = RadixCache(16, SIZE, pairs=True)
    serve(cache, [1, 2, 3, 4, 5])
    (event,) = stored(cache)
    assert event.token_ids == [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert (hit(cache, [1, 2, 3, 4, 5, 6]), hit(cache, [1, 2, 3, 4, 9, 6]), hit(cache, [1, 2, 3, 4, 5])) == (4, 2, 2)


def test_a_model_with_a_radix_tree_reports_hits_and_preempts() -> None:
    engine = EngineModel(RadixCache(8, SIZE), Timing(), max_tokens=4)
    for key, start in enumerate((0, 100, 0)):
        prompt = np.arange(start, start + 5, dtype=np.uint32)
        engine.submit(EngineRequest(id=key, prompt=prompt, reply=range(50, 57)))
    cached: dict[int, int] = {}
    while engine.busy:
        cached |= {output.request_id: output.cached_tokens for output in engine.step().outputs if output.finished}
    assert cached == {0: 0, 1: 0, 2: 4}
    assert engine.stats.preemptions > 0


@pytest.mark.parametrize(("pages", "size"), [(0, 16), (8, 0)])
def test_a_cache_without_room_for_a_token_is_refused(pages: int, size: int) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        RadixCache(pages, size)


def test_without_prefix_caching_nothing_is_cached_and_no_event_published() -> None:
    cache = RadixCache(16, SIZE, prefix_caching=False)
    serve(cache, [1, 2, 3, 4, 5])
    assert (hit(cache, [1, 2, 3, 4, 5]), cache.take_events(), cache.usage) == (0, [], 0)
