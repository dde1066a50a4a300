from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from matrixinfer.prompt.local import LocalTokenizer
from tests.virtual_time import VirtualTimeLoop, monotonic_of

from .fleet import TOKENIZER


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests marked `virtual_time` run on a loop that does not wait."""
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualTimeLoop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def tokenizer() -> LocalTokenizer:
    return LocalTokenizer.load(TOKENIZER, "chatml")


@pytest.fixture
async def loop(monkeypatch: pytest.MonkeyPatch) -> VirtualTimeLoop:
    """The loop of a test marked `virtual_time`, whose time is `time.monotonic` as well."""
    running = asyncio.get_running_loop()
    assert isinstance(running, VirtualTimeLoop)
    monotonic_of(running, monkeypatch)
    return running
