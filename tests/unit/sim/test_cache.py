from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from matrixinfer.sim.cache import BlockHit, PagedPrefixCache
from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.sequence import Sequence

SIZE = 2


def sequence(tokens: Iterable[int], salt: str | None = None, adapter: Adapter | None = None) -> Sequence:
    return Sequence(np.array(list(tokens), dtype=np.uint32), SIZE, salt, adapter)


def put(
    cache: PagedPrefixCache, tokens: Iterable[int], salt: str | None = None, adapter: Adapter | None = None
) -> Sequence:
    """Allocate blocks for a prompt."""
    held = sequence(tokens, salt, adapter)
    assert cache.allocate(held, len(held.tokens), cache.lookup(held))
    return held


def hit(cache: PagedPrefixCache, tokens: Iterable[int], salt: str | None = None, adapter: Adapter | None = None) -> int:
    return cache.lookup(sequence(tokens, salt, adapter)).tokens


def test_a_repeated_prompt_hits_all_but_the_block_of_its_last_token() -> None:
    cache = PagedPrefixCache(16, SIZE)
    cache.release(put(cache, [1, 2, 3, 4, 5]))
    assert hit(cache, [1, 2, 3, 4, 5]) == 4
    assert hit(cache, [1, 2, 3, 4]) == 2
    assert hit(cache, [1, 2, 9, 4, 5]) == 2
    assert hit(cache, [9, 2, 3, 4, 5]) == 0


def test_without_prefix_caching_nothing_is_cached_and_no_event_published() -> None:
    cache = PagedPrefixCache(16, SIZE, prefix_caching=False)
    cache.release(put(cache, [1, 2, 3, 4, 5]))
    assert (hit(cache, [1, 2, 3, 4, 5]), cache.take_events()) == (0, [])


def test_a_prompt_of_whole_blocks_sent_twice_keeps_its_last_block_twice() -> None:
    cache = PagedPrefixCache(16, SIZE)
    first, second = put(cache, [1, 2, 3, 4]), put(cache, [1, 2, 3, 4])
    stored = [event for event in cache.take_events() if isinstance(event, BlockStored)]
    assert [len(event.block_hashes) for event in stored] == [2, 1]
    assert stored[1].block_hashes[0] == stored[0].block_hashes[1]
    assert first.blocks[0][0] == second.blocks[0][0]
    assert first.blocks[0][1] != second.blocks[0][1]


def test_blocks_nobody_uses_are_evicted_oldest_first_and_tail_before_head() -> None:
    cache = PagedPrefixCache(6, SIZE)
    cache.release(put(cache, [1, 2, 3, 4]))
    cache.release(put(cache, [5, 6, 7, 8]))
    put(cache, [90, 91, 92, 93])
    assert (hit(cache, [1, 2, 3, 4, 0]), hit(cache, [5, 6, 7, 8, 0])) == (2, 4)


def test_blocks_in_use_are_never_evicted() -> None:
    cache = PagedPrefixCache(4, SIZE)
    put(cache, [1, 2, 3, 4])
    late = sequence([5, 6, 7, 8])
    assert not cache.fits(late, BlockHit([[]], 0))
    assert not cache.allocate(late, 4)
    assert late.blocks == [[]]
    assert hit(cache, [1, 2, 3, 4, 0]) == 4


def test_generated_tokens_fill_blocks_that_others_can_use() -> None:
    cache = PagedPrefixCache(16, SIZE)
    held = put(cache, [1, 2, 3])
    cache.take_events()
    held.append(4)
    assert cache.allocate(held, 4)
    (event,) = cache.take_events()
    assert isinstance(event, BlockStored)
    assert (event.token_ids, event.parent_block_hash) == ([3, 4], held.hashes[0])
    assert hit(cache, [1, 2, 3, 4, 5]) == 4


def test_a_salt_separates_prompts_and_is_in_the_first_blocks_event_only() -> None:
    cache = PagedPrefixCache(16, SIZE)
    put(cache, [1, 2, 3, 4, 5], salt="a")
    (event,) = cache.take_events()
    assert isinstance(event, BlockStored)
    assert event.extra_keys == [("a",), None]
    assert hit(cache, [1, 2, 3, 4, 5], salt="a") == 4
    assert hit(cache, [1, 2, 3, 4, 5], salt="b") == 0
    assert hit(cache, [1, 2, 3, 4, 5]) == 0


def test_an_adapter_separates_prompts_and_is_in_every_blocks_event_before_the_salt() -> None:
    cache = PagedPrefixCache(32, SIZE)
    french, terse = Adapter(1, "french"), Adapter(2, "terse")
    put(cache, [1, 2, 3, 4, 5], adapter=french)
    put(cache, [1, 2, 3, 4, 5], salt="a", adapter=french)
    plain, salted = cache.take_events()
    assert isinstance(plain, BlockStored)
    assert isinstance(salted, BlockStored)
    assert plain.extra_keys == [("french",), ("french",)]
    assert salted.extra_keys == [("french", "a"), ("french",)]
    assert (plain.lora_id, plain.lora_name) == (salted.lora_id, salted.lora_name) == (1, "french")
    assert hit(cache, [1, 2, 3, 4, 5], adapter=french) == 4
    assert hit(cache, [1, 2, 3, 4, 5], adapter=terse) == hit(cache, [1, 2, 3, 4, 5]) == 0
    assert hit(cache, [1, 2, 3, 4, 5], salt="french") == 0


def test_a_reset_is_refused_while_a_block_is_in_use() -> None:
    cache = PagedPrefixCache(16, SIZE)
    held = put(cache, [1, 2, 3])
    assert not cache.reset()
    cache.release(held)
    cache.take_events()
    assert cache.reset()
    assert hit(cache, [1, 2, 3]) == 0
    assert cache.take_events() == [AllBlocksCleared()]


def test_usage_counts_only_blocks_in_use() -> None:
    cache = PagedPrefixCache(5, SIZE)
    held = put(cache, [1, 2, 3])
    assert cache.usage == 0.5
    cache.release(held)
    assert cache.usage == 0


@pytest.mark.parametrize(("blocks", "size"), [(1, 16), (8, 0)])
def test_a_cache_without_room_for_a_token_is_refused(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        PagedPrefixCache(blocks, size)


class EventReader:
    """What a reader of the events knows: how many copies each chain of tokens has."""

    def __init__(self) -> None:
        self.copies: Counter[int] = Counter()
        self.names: dict[tuple[str | None, tuple[int, ...]], int] = {}
        self._chains: dict[int, tuple[str | None, tuple[int, ...]]] = {}

    def read(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case BlockStored():
                    self._stored(event)
                case BlockRemoved():
                    self.copies.subtract(event.block_hashes)
                case AllBlocksCleared():
                    self.copies.clear()

    def _stored(self, event: BlockStored) -> None:
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        parent = event.parent_block_hash
        salt = ((event.extra_keys or [None])[0] or (None,))[0]
        assert salt is None or isinstance(salt, str)
        root: tuple[str | None, tuple[int, ...]] = (salt, ())
        salt, tokens = root if parent is None else self._chains[parent]
        for i, block_hash in enumerate(event.block_hashes):
            tokens = (*tokens, *event.token_ids[i * event.block_size : (i + 1) * event.block_size])
            chain = (salt, tokens)
            assert self.names.setdefault(chain, block_hash) == block_hash
            assert self._chains.setdefault(block_hash, chain) == chain
            self.copies[block_hash] += 1

    def hit(self, tokens: list[int], salt: str | None) -> int:
        for blocks in range((len(tokens) - 1) // SIZE):
            name = self.names.get((salt, tuple(tokens[: (blocks + 1) * SIZE])))
            if name is None or self.copies[name] < 1:
                return blocks * SIZE
        return (len(tokens) - 1) // SIZE * SIZE


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9)
salts = st.sampled_from([None, "a"])


class CacheMachine(RuleBasedStateMachine):
    """Requests start, grow and end. A reader of the events that counts copies always knows the next hit."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedPrefixCache(8, SIZE)
        self.reader = EventReader()
        self.running: list[Sequence] = []

    @rule(tokens=prompts, salt=salts)
    def begin(self, tokens: list[int], salt: str | None) -> None:
        new = sequence(tokens, salt)
        found = self.cache.lookup(new)
        assert found.tokens == self.reader.hit(tokens, salt)
        if self.cache.fits(new, found):
            assert self.cache.allocate(new, len(tokens), found)
            self.running.append(new)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        grown = data.draw(st.sampled_from(self.running))
        grown.append(token)
        if not self.cache.allocate(grown, len(grown.tokens)):
            self.running.remove(grown)
            self.cache.release(grown)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.cache.release(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @rule()
    def reset(self) -> None:
        assert self.cache.reset() == (not self.running)

    @invariant()
    def events_report_the_cached_blocks(self) -> None:
        self.reader.read(self.cache.take_events())
        assert all(count >= 0 for count in self.reader.copies.values())

    @invariant()
    def running_requests_have_enough_blocks(self) -> None:
        held = {block for each in self.running for block in each.blocks[0]}
        assert 0 not in held
        assert self.cache.usage == pytest.approx(len(held) / 7)
        for each in self.running:
            assert len(each.blocks[0]) == -(-len(each.tokens) // SIZE)
            assert hit(self.cache, [*each.tokens, 0], each.salt) >= len(each.tokens) // SIZE * SIZE


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestCacheAgainstItsEvents = CacheMachine.TestCase
