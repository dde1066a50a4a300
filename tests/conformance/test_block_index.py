from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeAlias

import pytest
from hypothesis import given, settings

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.redis.index import RedisIndex
from matrixinfer.index.redis.reader import CHUNK
from matrixinfer.index.redis.store import Store
from tests.servers import Server

from .block_index import MODELS, CountingChain, Model, OpenIndex, Operation, Tree, histories, name_of

CHAIN = [name_of(node) for node in range(8)]


Backend: TypeAlias = Callable[[Callable[[], Server]], AbstractAsyncContextManager[BlockIndex]]
"""Opens an empty index, in the server that it is given if it asks for one."""


@asynccontextmanager
async def memory_index(_: Callable[[], Server]) -> AsyncIterator[BlockIndex]:
    yield MemoryIndex()


@asynccontextmanager
async def memory_index_of_blocks_alone(_: Callable[[], Server]) -> AsyncIterator[BlockIndex]:
    yield MemoryIndex(prefix_closed=False)


@asynccontextmanager
async def redis_index(server: Callable[[], Server], *, scripts: bool = True) -> AsyncIterator[BlockIndex]:
    server().flush()
    async with (
        Store(server().config(scripts=scripts)) as store,
        RedisIndex(store, TokenBlockProcessor(), max_age=86_400.0) as index,
    ):
        yield index


def redis_index_by_pipeline(server: Callable[[], Server]) -> AbstractAsyncContextManager[BlockIndex]:
    return redis_index(server, scripts=False)


WITHOUT_HOLES: list[Backend] = [memory_index]
WITH_HOLES: list[Backend] = [memory_index_of_blocks_alone]
IN_A_SERVER: list[Backend] = [redis_index, redis_index_by_pipeline]

in_a_server = [pytest.param(backend, marks=pytest.mark.server) for backend in IN_A_SERVER]
every_backend = pytest.mark.parametrize("open_index", [*WITHOUT_HOLES, *WITH_HOLES, *in_a_server], indirect=True)


@pytest.fixture(scope="session")
def open_index(request: pytest.FixtureRequest) -> OpenIndex:
    backend: Backend = request.param
    return lambda: backend(lambda: request.getfixturevalue("valkey"))


async def check_history(open_index: OpenIndex, tree: Tree, operations: list[Operation]) -> None:
    async with open_index() as index:
        model = Model(tree, prefix_closed=index.prefix_closed)
        chains = [tree.path(node) for node in range(len(tree.parents))]
        for operation in operations:
            model.apply(operation, index)
            await index.flush()
            for name in MODELS:
                for chain in chains:
                    assert await index.match(name, chain) == model.count(name, chain)


@pytest.mark.parametrize("open_index", [*WITHOUT_HOLES, *WITH_HOLES], indirect=True)
@given(history=histories())
async def test_every_history_leaves_what_a_dict_of_sets_holds(
    open_index: OpenIndex, history: tuple[Tree, list[Operation]]
) -> None:
    await check_history(open_index, *history)


@pytest.mark.parametrize("open_index", in_a_server, indirect=True)
@settings(max_examples=30)
@given(history=histories())
async def test_every_history_leaves_that_in_a_server_too(
    open_index: OpenIndex, history: tuple[Tree, list[Operation]]
) -> None:
    await check_history(open_index, *history)


@every_backend
async def test_a_match_counts_consecutive_blocks_from_the_start(open_index: OpenIndex) -> None:
    async with open_index() as index:
        index.add("llama", "pod-a", CHAIN[:3], None)
        index.add("llama", "pod-b", CHAIN[:6], None)
        index.add("llama", "pod-b", CHAIN[6:], CHAIN[5])
        await index.flush()
        assert await index.match("llama", CHAIN) == {"pod-a": 3, "pod-b": 8}
        assert await index.match("llama", CHAIN[:2]) == {"pod-a": 2, "pod-b": 2}
        assert await index.match("llama", [name_of(99), *CHAIN]) == {}


@every_backend
async def test_nothing_matches_where_nothing_is_known(open_index: OpenIndex) -> None:
    async with open_index() as index:
        index.add("llama", "pod-a", CHAIN, None)
        await index.flush()
        assert await index.match("qwen", CHAIN) == {}
        assert await index.match("llama", []) == {}


@every_backend
async def test_adds_and_removes_may_be_repeated(open_index: OpenIndex) -> None:
    async with open_index() as index:
        for _ in range(2):
            index.add("llama", "pod-a", CHAIN, None)
        await index.flush()
        assert index.stats().blocks == len(CHAIN)
        for _ in range(2):
            index.remove("llama", "pod-a", CHAIN[4:][::-1])
        await index.flush()
        assert await index.match("llama", CHAIN) == {"pod-a": 4}
        assert index.stats().blocks == 4


@every_backend
async def test_removing_what_was_never_there_changes_nothing(open_index: OpenIndex) -> None:
    async with open_index() as index:
        index.remove("llama", "pod-a", CHAIN)
        index.clear("pod-a")
        index.forget("pod-a")
        index.add("llama", "pod-a", CHAIN[:2], None)
        index.remove("llama", "pod-b", CHAIN)
        index.remove("qwen", "pod-a", CHAIN)
        await index.flush()
        assert await index.match("llama", CHAIN) == {"pod-a": 2}


@every_backend
@pytest.mark.parametrize("forget", [False, True])
async def test_a_cleared_pod_holds_nothing_of_any_model_and_may_come_back(open_index: OpenIndex, forget: bool) -> None:
    async with open_index() as index:
        for model in MODELS:
            index.add(model, "pod-a", CHAIN, None)
            index.add(model, "pod-b", CHAIN[:5], None)
        (index.forget if forget else index.clear)("pod-a")
        await index.flush()
        assert [await index.match(model, CHAIN) for model in MODELS] == [{"pod-b": 5}] * 2
        index.add("llama", "pod-a", CHAIN[:2], None)
        await index.flush()
        assert await index.match("llama", CHAIN) == {"pod-a": 2, "pod-b": 5}


@pytest.mark.parametrize("open_index", [*WITH_HOLES, *in_a_server], indirect=True)
async def test_a_pod_without_the_first_block_does_not_match(open_index: OpenIndex) -> None:
    async with open_index() as index:
        index.add("llama", "pod-a", CHAIN[1:], CHAIN[0])
        index.add("llama", "pod-b", CHAIN, None)
        index.remove("llama", "pod-b", [CHAIN[3]])
        await index.flush()
        assert await index.match("llama", CHAIN) == {"pod-b": 3}


def may_read(index: BlockIndex, held: int) -> int:
    """How far a chain may be read of which `held` blocks match."""
    if isinstance(index, RedisIndex):
        return held + CHUNK
    return 2 * held + 1 if index.prefix_closed else held + 1


@every_backend
@pytest.mark.parametrize("held", [0, 1, 2, 3, 7, 100, 1000])
async def test_a_match_reads_the_chain_little_further_than_it_matches(open_index: OpenIndex, held: int) -> None:
    async with open_index() as index:
        for pod, count in (("pod-a", held), ("pod-b", held // 2), ("pod-c", held // 3)):
            index.add("llama", pod, CountingChain(count)[:], None)
        await index.flush()
        chain = CountingChain(10_000)
        counts = await index.match("llama", chain)
        assert max(counts.values(), default=0) == held
        assert chain.read <= may_read(index, held)


@every_backend
async def test_a_match_reads_one_block_when_all_pods_are_cleared(open_index: OpenIndex) -> None:
    async with open_index() as index:
        index.add("llama", "pod-a", CountingChain(100)[:], None)
        index.clear("pod-a")
        await index.flush()
        chain = CountingChain(100)
        assert await index.match("llama", chain) == {}
        assert chain.read <= may_read(index, 0)


@every_backend
async def test_statistics_count_blocks_once_and_pods_that_hold_any(open_index: OpenIndex) -> None:
    async with open_index() as index:
        assert (index.stats().blocks, index.stats().pods) == (0, 0)
        index.add("llama", "pod-a", CHAIN, None)
        index.add("llama", "pod-b", CHAIN, None)
        index.add("qwen", "pod-b", CHAIN[:2], None)
        await index.flush()
        stats = index.stats()
        assert (stats.blocks, stats.pods, stats.evicted) == (10, 2, 0)
        index.forget("pod-b")
        await index.flush()
        assert index.stats().pods == 1
