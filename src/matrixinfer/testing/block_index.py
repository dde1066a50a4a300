"""What every block index must do, in memory or behind a network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

from hypothesis import given, settings

from matrixinfer.index.base import BlockIndex
from matrixinfer.testing.expect import expect, expect_equal
from matrixinfer.testing.index_oracle import (
    ENDS,
    MODELS,
    PODS,
    CountingChain,
    Model,
    Operation,
    Tree,
    histories,
    name_of,
)

CHAIN: Sequence[int] = [name_of(node) for node in range(8)]
NAMES = (*PODS, *ENDS)


class BlockIndexConformance:
    """The suite. Open the index in a subclass, and pytest runs every method that begins with `test_`.

    For example, where `connect` returns an async context manager that yields an empty index::

        class TestMyIndex(BlockIndexConformance):
            def open(self):
                return MyIndex.connect("localhost")

    Without pytest, `TestMyIndex().run()` does the same. Each test runs an event loop of its own, so that no plugin of
    pytest is needed; `open` is called several times per test.
    """

    max_examples: ClassVar[int] = 100
    """Histories that are tried. Fewer will do for a backend behind a network."""

    def open(self) -> AbstractAsyncContextManager[BlockIndex]:
        """Open an empty index, and close it afterwards."""
        raise NotImplementedError(f"{type(self).__qualname__}.open: expected a method that opens an empty index")

    def may_read(self, index: BlockIndex, held: int) -> int:
        """How far a lookup may read a chain whose first `held` blocks match. A backend that reads in chunks reads further."""
        return 2 * held + 1 if index.prefix_closed else held + 1

    def run(self) -> None:
        """Run every test. Raises `AssertionError` at the first that fails."""
        for name in dir(self):
            if name.startswith("test_"):
                getattr(self, name)()

    def test_every_history_leaves_what_a_dict_of_sets_holds(self) -> None:
        async def check(index: BlockIndex, tree: Tree, operations: list[Operation]) -> None:
            model = Model(tree, prefix_closed=index.prefix_closed)
            chains = [tree.path(node) for node in range(len(tree.parents))]
            every = [*map(name_of, range(len(tree.parents)))]
            for step, operation in enumerate(operations):
                model.apply(operation, index)
                await index.flush()
                for name in MODELS:
                    for chain in chains:
                        await _expect_match(index, name, chain, model.count(name, chain))
                    await _expect_last(index, name, NAMES, every, model.last(name, NAMES, every))
                    asked, chain = NAMES[step % 5 : step % 7], chains[step % len(chains)]
                    await _expect_last(index, name, asked, chain, model.last(name, asked, chain))

        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:

            @settings(max_examples=self.max_examples, deadline=None)
            @given(history=histories())
            def every(history: tuple[Tree, list[Operation]]) -> None:
                runner.run(self._with_index(lambda index: check(index, *history)))

            every()

    def test_a_match_counts_consecutive_blocks_from_the_start(self) -> None:
        async def check(index: BlockIndex) -> None:
            index.add("llama", "pod-a", CHAIN[:3], None)
            index.add("llama", "pod-b", CHAIN[:6], None)
            index.add("llama", "pod-b", CHAIN[6:], CHAIN[5])
            await index.flush()
            await _expect_match(index, "llama", CHAIN, {"pod-a": 3, "pod-b": 8})
            await _expect_match(index, "llama", CHAIN[:2], {"pod-a": 2, "pod-b": 2})
            await _expect_match(index, "llama", [name_of(99), *CHAIN], {})

        self._check(check)

    def test_nothing_matches_where_nothing_is_known(self) -> None:
        async def check(index: BlockIndex) -> None:
            index.add("llama", "pod-a", CHAIN, None)
            await index.flush()
            await _expect_match(index, "qwen", CHAIN, {})
            await _expect_match(index, "llama", [], {})

        self._check(check)

    def test_adds_and_removes_may_be_repeated(self) -> None:
        async def check(index: BlockIndex) -> None:
            for _ in range(2):
                index.add("llama", "pod-a", CHAIN, None)
            await index.flush()
            expect_equal(index.stats().blocks, len(CHAIN), "stats().blocks after adding twice")
            for _ in range(2):
                index.remove("llama", "pod-a", CHAIN[4:][::-1])
            await index.flush()
            await _expect_match(index, "llama", CHAIN, {"pod-a": 4})
            expect_equal(index.stats().blocks, 4, "stats().blocks after removing twice")

        self._check(check)

    def test_removing_what_was_never_there_changes_nothing(self) -> None:
        async def check(index: BlockIndex) -> None:
            index.remove("llama", "pod-a", CHAIN)
            index.clear("pod-a")
            index.forget("pod-a")
            index.add("llama", "pod-a", CHAIN[:2], None)
            index.remove("llama", "pod-b", CHAIN)
            index.remove("qwen", "pod-a", CHAIN)
            await index.flush()
            await _expect_match(index, "llama", CHAIN, {"pod-a": 2})

        self._check(check)

    def test_a_cleared_pod_holds_nothing_and_may_come_back(self) -> None:
        async def check(index: BlockIndex, leave: Callable[[str], None]) -> None:
            for model in MODELS:
                index.add(model, "pod-a", CHAIN, None)
                index.add(model, "pod-b", CHAIN[:5], None)
            leave("pod-a")
            await index.flush()
            for model in MODELS:
                await _expect_match(index, model, CHAIN, {"pod-b": 5})
            index.add("llama", "pod-a", CHAIN[:2], None)
            await index.flush()
            await _expect_match(index, "llama", CHAIN, {"pod-a": 2, "pod-b": 5})

        self._check(lambda index: check(index, index.clear))
        self._check(lambda index: check(index, index.forget))

    def test_a_pod_without_the_first_block_does_not_match(self) -> None:
        async def check(index: BlockIndex) -> None:
            if index.prefix_closed:
                return  # its pods never hold a block without those before it
            index.add("llama", "pod-a", CHAIN[1:], CHAIN[0])
            index.add("llama", "pod-b", CHAIN, None)
            index.remove("llama", "pod-b", [CHAIN[3]])
            await index.flush()
            await _expect_match(index, "llama", CHAIN, {"pod-b": 3})

        self._check(check)

    def test_a_match_reads_the_chain_little_further_than_it_matches(self) -> None:
        async def check(index: BlockIndex, held: int) -> None:
            for pod, count in (("pod-a", held), ("pod-b", held // 2), ("pod-c", held // 3)):
                index.add("llama", pod, CountingChain(count)[:], None)
            await index.flush()
            chain = CountingChain(10_000)
            counts = await index.match("llama", chain)
            expect_equal(max(counts.values(), default=0), held, "the longest match")
            self._expect_read(index, chain, held)

        for held in (0, 1, 2, 3, 7, 100, 1000):
            self._check(lambda index, held=held: check(index, held))  # type: ignore[misc]

    def test_a_match_reads_no_further_when_all_pods_are_cleared(self) -> None:
        async def check(index: BlockIndex) -> None:
            index.add("llama", "pod-a", CountingChain(100)[:], None)
            index.clear("pod-a")
            await index.flush()
            chain = CountingChain(100)
            expect_equal(dict(await index.match("llama", chain)), {}, "match() after clear()")
            self._expect_read(index, chain, 0)

        self._check(check)

    def test_the_last_block_is_found_whatever_lies_before_it(self) -> None:
        async def check(index: BlockIndex) -> None:
            index.add("llama", "pod-a", CHAIN[:3], None)
            index.add("llama", "pod-a~ends", [CHAIN[5], CHAIN[2]], None)
            index.add("llama", "pod-b~ends", CHAIN[7:], None)
            await index.flush()
            names = ("pod-a", "pod-a~ends", "pod-b", "pod-b~ends")
            await _expect_last(index, "llama", names, CHAIN, {"pod-a": 2, "pod-a~ends": 5, "pod-b~ends": 7})
            await _expect_last(index, "llama", names, CHAIN[:5], {"pod-a": 2, "pod-a~ends": 2})
            await _expect_last(index, "llama", names, [CHAIN[2]] * 3, {"pod-a": 2, "pod-a~ends": 2})
            index.remove("llama", "pod-a~ends", [CHAIN[5]])
            await index.flush()
            await _expect_last(index, "llama", names[1:2], CHAIN, {"pod-a~ends": 2})

        self._check(check)

    def test_no_last_block_is_found_where_nothing_is_asked_or_known(self) -> None:
        async def check(index: BlockIndex) -> None:
            await _expect_last(index, "llama", NAMES, CHAIN, {})
            index.add("llama", "pod-a~ends", CHAIN, None)
            await index.flush()
            await _expect_last(index, "llama", ["pod-a~ends"], [], {})
            await _expect_last(index, "llama", [], CHAIN, {})
            await _expect_last(index, "llama", ["pod-a", "pod-c~ends"], CHAIN, {})
            await _expect_last(index, "qwen", ["pod-a~ends"], CHAIN, {})

        self._check(check)

    def test_a_last_block_far_from_the_end_is_found(self) -> None:
        async def check(index: BlockIndex) -> None:
            chain = CountingChain(5_000)[:]
            for name, position in (("pod-a~ends", 0), ("pod-b~ends", 2_000), ("pod-c~ends", 4_990)):
                index.add("llama", name, [chain[position]], None)
            await index.flush()
            expected = {"pod-a~ends": 0, "pod-b~ends": 2_000, "pod-c~ends": 4_990}
            await _expect_last(index, "llama", [*expected, "pod-d~ends"], chain, expected)

        self._check(check)

    def test_ends_come_and_go_by_their_own_name_and_never_match(self) -> None:
        async def check(index: BlockIndex, leave: Callable[[str], None]) -> None:
            index.add("llama", "pod-a", CHAIN[:2], None)
            index.add("llama", "pod-a~ends", CHAIN, None)
            index.add("llama", "pod-b~ends", CHAIN[:5], None)
            await index.flush()
            await _expect_match(index, "llama", CHAIN, {"pod-a": 2})
            stats = index.stats()
            expect_equal((stats.blocks, stats.pods), (2, 1), "stats(): blocks, pods, both without ends")
            leave("pod-a")
            await index.flush()
            names = ("pod-a", "pod-a~ends", "pod-b~ends")
            await _expect_last(index, "llama", names, CHAIN, {"pod-a~ends": 7, "pod-b~ends": 4})
            leave("pod-a~ends")
            await index.flush()
            await _expect_last(index, "llama", names, CHAIN, {"pod-b~ends": 4})
            index.add("llama", "pod-a~ends", CHAIN[:1], None)
            await index.flush()
            await _expect_last(index, "llama", names, CHAIN, {"pod-a~ends": 0, "pod-b~ends": 4})
            await _expect_match(index, "llama", CHAIN, {})

        self._check(lambda index: check(index, index.clear))
        self._check(lambda index: check(index, index.forget))

    def test_statistics_count_blocks_once_and_pods_that_hold_any(self) -> None:
        async def check(index: BlockIndex) -> None:
            expect_equal((index.stats().blocks, index.stats().pods), (0, 0), "stats() of an empty index: blocks, pods")
            index.add("llama", "pod-a", CHAIN, None)
            index.add("llama", "pod-b", CHAIN, None)
            index.add("qwen", "pod-b", CHAIN[:2], None)
            await index.flush()
            stats = index.stats()
            expect_equal((stats.blocks, stats.pods, stats.evicted), (10, 2, 0), "stats(): blocks, pods, evicted")
            index.forget("pod-b")
            await index.flush()
            expect_equal(index.stats().pods, 1, "stats().pods after forget()")

        self._check(check)

    def _check(self, check: Callable[[BlockIndex], Awaitable[None]]) -> None:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(self._with_index(check))

    async def _with_index(self, check: Callable[[BlockIndex], Awaitable[None]]) -> None:
        async with self.open() as index:
            await check(index)

    def _expect_read(self, index: BlockIndex, chain: CountingChain, held: int) -> None:
        limit = self.may_read(index, held)
        expect(chain.read <= limit, f"match() read {chain.read} blocks where {held} match, expected at most {limit}")


async def _expect_match(index: BlockIndex, model: str, chain: Sequence[int], expected: dict[str, int]) -> None:
    expect_equal(dict(await index.match(model, chain)), expected, f"match({model!r}, {len(chain)} blocks)")


async def _expect_last(
    index: BlockIndex, model: str, names: Collection[str], hashes: Sequence[int], expected: dict[str, int]
) -> None:
    what = f"last({model!r}, {sorted(names)}, {len(hashes)} blocks)"
    expect_equal(dict(await index.last(model, names, hashes)), expected, what)
