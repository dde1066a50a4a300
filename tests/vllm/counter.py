"""Reads hits from an engine's own counter, for engines whose answers do not report them."""

from __future__ import annotations

import asyncio

from .engine import NAME, Engine
from .results import Tally
from .target import COMPLETIONS, Target

COUNTED_SECONDS = 10.0
"""How long `/metrics` may lag behind an answer."""


class Counter:
    """Sends requests through the gateway, one at a time, and reads the counter before and after each."""

    def __init__(self, target: Target, engine: Engine) -> None:
        self._target = target
        self._engine = engine

    async def ask(self, tally: Tally, prompt: list[int]) -> tuple[int, int]:
        """Send a request. Returns the predicted hit, and the hit that the engine counted, in tokens."""
        target, body = self._target, {"model": NAME, "prompt": prompt, "max_tokens": 4, "stream": True}
        await target.wait_for_events()
        decision = await target.explain(COMPLETIONS, body)
        predicted: int = decision["predicted_hit_tokens"]
        queries, hits = await self._read()
        async with target.session.post(target.service.gateway.url + COMPLETIONS, json=body) as response:
            assert response.status == 200
            assert '"usage":{' not in await response.text()
        async with asyncio.timeout(COUNTED_SECONDS):
            while (now := await self._read())[0] < queries + len(prompt):
                await asyncio.sleep(0.05)
        found = round(now[1] - hits)
        tally.add(predicted, found)
        return predicted, found

    async def reset(self) -> None:
        """Empty the engine's cache."""
        async with self._target.session.post(f"{self._engine.url}/reset_prefix_cache") as response:
            assert response.status == 200

    async def _read(self) -> tuple[float, float]:
        """Tokens looked up in the cache, and found there, since the engine started."""
        async with self._target.session.get(f"{self._engine.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        queries, hits = (
            sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:prefix_cache_{name}_total{{"))
            for name in ("queries", "hits")
        )
        return queries, hits
