"""What an engine found in its cache, by its own count: for engines whose answers do not tell."""

from __future__ import annotations

import asyncio

from .engine import NAME, Engine
from .results import Tally
from .target import COMPLETIONS, Target

COUNTED_SECONDS = 10.0
"""From an answer to the count in `/metrics`."""


class Counter:
    """Asks through the gateway, one request at a time, and reads the count before and after."""

    def __init__(self, target: Target, engine: Engine) -> None:
        self._target = target
        self._engine = engine

    async def ask(self, tally: Tally, prompt: list[int]) -> tuple[int, int]:
        """Tokens that were foretold, and that were found."""
        target, body = self._target, {"model": NAME, "prompt": prompt, "max_tokens": 4, "stream": True}
        await target.quiet()
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
        tally.note(predicted, found)
        return predicted, found

    async def reset(self) -> None:
        """Empty the engine's cache."""
        async with self._target.session.post(f"{self._engine.url}/reset_prefix_cache") as response:
            assert response.status == 200

    async def _read(self) -> tuple[float, float]:
        """Tokens looked up in the cache, and found there, since the engine began."""
        async with self._target.session.get(f"{self._engine.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        queries, hits = (
            sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:prefix_cache_{name}_total{{"))
            for name in ("queries", "hits")
        )
        return queries, hits
