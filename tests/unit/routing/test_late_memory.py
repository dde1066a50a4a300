"""What outlasts a request while an engine is still asked for its token ids."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from matrixinfer.blocks import TokenIds
from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import Engine, RemoteTokenizer
from matrixinfer.routing.prepared import Degraded
from tests.waiting import eventually

from .test_router import World, request


class SlowEngines:
    """Engines that send token ids once they are told to."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.costs: dict[str, Any] = {}

    async def tokenize(self, prompt: Prompt, engines: Sequence[Engine], model: str, **_: float) -> TokenIds:
        await self.release.wait()
        return np.arange(40, dtype=np.uint32)


async def test_a_request_that_is_over_leaves_no_body_behind_while_its_token_ids_are_late() -> None:
    engines = SlowEngines()
    remote = cast("RemoteTokenizer", engines)
    models = (ModelConfig(name="m"),)
    async with TokenizerManager(models, TokenizationConfig(wait_milliseconds=0.0), remote) as tokenizers:
        world = World(tokenizers=tokenizers)
        body = request(prompt="x" * 400_000)
        before = sys.getrefcount(body)
        sent = await world.dispatch(body)
        assert Degraded.LATE in sent.prepared.degraded
        assert sent.prepared.body is body
        sent.answered(200)
        sent.first_byte()
        await world.finish(sent)
        gc.collect()
        assert tokenizers.late == 1
        assert sys.getrefcount(body) == before
        engines.release.set()
        await eventually(lambda: len(sent.request.chain) == 10)
