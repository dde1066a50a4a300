from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from matrixinfer.blocks import Scheme, TokenBlockProcessor
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.redis.index import RedisIndex
from matrixinfer.index.redis.reader import CHUNK
from matrixinfer.index.redis.store import Store
from matrixinfer.testing import BlockIndexConformance
from tests.servers import Server


class TestMemoryIndex(BlockIndexConformance):
    prefix_closed = True

    @asynccontextmanager
    async def open(self) -> AsyncIterator[BlockIndex]:
        yield MemoryIndex(prefix_closed=self.prefix_closed)


class TestMemoryIndexOfBlocksAlone(TestMemoryIndex):
    prefix_closed = False


@pytest.mark.server
class TestRedisIndex(BlockIndexConformance):
    max_examples = 30
    scripts = True
    scheme: Scheme = "prefix"

    @pytest.fixture(autouse=True)
    def server_of_the_test(self, valkey: Server) -> None:
        self.server = valkey

    @asynccontextmanager
    async def open(self) -> AsyncIterator[BlockIndex]:
        self.server.flush()
        async with (
            Store(self.server.config(scripts=self.scripts)) as store,
            RedisIndex(store, TokenBlockProcessor(scheme=self.scheme), max_age=86_400.0) as index,
        ):
            yield index

    def may_read(self, index: BlockIndex, held: int) -> int:
        return held + CHUNK


class TestRedisIndexByPipeline(TestRedisIndex):
    scripts = False


class TestRedisIndexOfBlocksAlone(TestRedisIndex):
    scheme = "block"


class TestRedisIndexOfBlocksAloneByPipeline(TestRedisIndexOfBlocksAlone):
    scripts = False


class BrokenIndex(MemoryIndex):
    """Forgets to forget."""

    def clear(self, pod: str) -> None:
        pass


class BrokenIndexConformance(BlockIndexConformance):
    def open(self) -> AbstractAsyncContextManager[BlockIndex]:
        @asynccontextmanager
        async def opened() -> AsyncIterator[BlockIndex]:
            yield BrokenIndex()

        return opened()


def test_the_suite_says_what_a_broken_index_does() -> None:
    suite = BrokenIndexConformance()
    with pytest.raises(AssertionError, match=r"match\('llama', 8 blocks\): expected {'pod-b': 5}, got {.*'pod-a': 8"):
        suite.test_a_cleared_pod_holds_nothing_and_may_come_back()
    with pytest.raises(AssertionError):
        suite.run()
