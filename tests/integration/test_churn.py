"""Pods that come, take requests and go, a thousand of them: nothing of them stays."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import pytest

from matrixinfer.app.service import Service
from matrixinfer.config import (
    Config,
    KvEventsConfig,
    ModelConfig,
    OutliersConfig,
    PodConfig,
    PodWatchConfig,
    SchedulerConfig,
)
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import ServedNames
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.sim.events import BlockRemoved, BlockStored, EventBatch, Medium, encode
from matrixinfer.trust.drift import Lookups
from tests.unit.routing.support import Dispatcher

PATH = "/v1/completions"
SOURCE = KvEventsConfig(endpoint="tcp://127.0.0.1:1")
SOURCES = tuple(KvSource(endpoint=SOURCE.endpoint, rank=rank) for rank in (0, 1))
NOBODY = "http://127.0.0.1:1"
SIZE = 16
PRESENT = 3
CONFIG = Config(
    listen="127.0.0.1:0",
    admin="127.0.0.1:0",
    models=(ModelConfig(name="m"),),
    pod_watch=PodWatchConfig(scrape_interval_seconds=60.0),
    scheduler=SchedulerConfig(pending_seconds=0.0, decisions_kept=100),
    outliers=OutliersConfig(max_ejected_share=0.0),  # so that the draws alone decide where requests go
)


@dataclass
class World:
    service: Service
    rng: random.Random

    def __post_init__(self) -> None:
        self.requests = Dispatcher(self.service.router)

    def name(self, number: int) -> str:
        return f"pod-{number}"

    def come(self, number: int) -> None:
        """A pod joins, reports what it is (every third has two ranks), and publishes what it holds."""
        service, name = self.service, self.name(number)
        config = PodConfig(name=name, url=NOBODY, kv_events=SOURCE)
        service.join(config)
        registry = service.engines.registry
        names = ServedNames(base_model="m", aliases=frozenset({"m"}), adapters={f"lora-{number}": "m"})
        registry.learn(name, served=names, kv_sources=SOURCES[: 2 if number % 3 == 0 else 1])
        registry.answered(name)
        pod = registry.pods[-1]
        service.watching.discovered(pod)
        for endpoint in pod.endpoints:
            feed = service.engines.subscriber.feeds[endpoint.name]
            start = number % 2  # every second one is followed too late, so that what is sent there is remembered
            feed.live(start, self.frame(range(1, 9), "GPU"))
            feed.live(start + 1, self.frame(range(9, 13), "CPU"))
            feed.live(start + 2, encode(EventBatch(0.0, [BlockRemoved(block_hashes=[12], medium="CPU", group_idx=0)])))
            service.engines.drift.measured(endpoint.name, Lookups(0, 0), began_at=0.0)

    def frame(self, blocks: range, medium: Medium) -> bytes:
        """As many new blocks that follow each other."""
        stored = BlockStored(
            block_hashes=list(blocks),
            parent_block_hash=None,
            token_ids=self.tokens(len(blocks)),
            block_size=SIZE,
            medium=medium,
            extra_keys=[None] * len(blocks),
        )
        return encode(EventBatch(0.0, [stored]))

    def tokens(self, blocks: int) -> list[int]:
        return self.rng.choices(range(50_000), k=blocks * SIZE)

    async def ask(self, model: str) -> InFlight:
        """A request that is answered, not to its end."""
        body = msgspec.json.encode({"model": model, "prompt": self.tokens(20)})
        request = await self.requests.dispatch(PATH, body)
        if len(request.decision.attempts) > 1 and self.rng.random() < 0.3:
            request.failed("connect")
            request.move(request.decision.attempts[1])
        request.answered(200)
        request.first_byte()
        return request

    async def end(self, request: InFlight) -> None:
        """Its answer reports no hit, and breaks off."""
        metrics, model, pod = self.service.metrics, request.decision.request.model, request.pod.name
        request.usage(320, 0)
        metrics.upstream_error(pod, "broken")
        metrics.request(model, 200, 0.1)
        await self.requests.finish(request)

    def sizes(self) -> dict[str, float]:
        """How much every part keeps, as far as it says so; `tracemalloc` sees the rest."""
        engines, metrics = self.service.engines, self.service.metrics
        lines = metrics.render().splitlines()
        kept = {
            part: metrics.registry.get_sample_value("matrixinfer_kept_entries", {"part": part}) or 0
            for part in ("recent_blocks", "pending_blocks", "drift_endpoints", "parity_samples", "decisions")
        }
        return kept | {
            "pods": len(engines.registry.pods),
            "feeds": len(engines.subscriber.feeds),
            "tasks": len(asyncio.all_tasks()),
            "index pods": engines.setup.index.stats().pods,
            "series of pods": sum(b'pod="' in line for line in lines),
            "series of models": sum(b'model="' in line for line in lines),
        }


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with Service(CONFIG) as service:
        yield World(service, random.Random(7))


async def churn(world: World, numbers: range) -> None:
    """So many pods come, take requests, and go, each while a request is still there."""
    for number in numbers:
        world.come(number)
        for model in ("m", "m", f"lora-{number}"):
            await world.end(await world.ask(model))
        late = [await world.ask("m") for _ in range(2)]
        world.service.leave(world.name(number - PRESENT))
        for request in late:
            await world.end(request)
        await asyncio.sleep(0)


async def settled(world: World) -> int:
    """Bytes traced once the tasks of pods that left have ended, and the next one that leaves had the rest forgotten."""
    await asyncio.sleep(1.1)  # events of their last requests may come within a second
    world.service.router.keep_models()
    world.service.state.ladder.keep_models(())  # it remembers blocks wherever they were computed, within its own bound
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.slow
async def test_nothing_stays_of_a_thousand_pods_that_come_and_go(world: World) -> None:
    empty = world.sizes()
    await churn(world, range(204))
    tracemalloc.start()
    try:
        await churn(world, range(204, 252))
        before, traced = world.sizes(), await settled(world)
        await churn(world, range(252, 1000))
        after, grown = world.sizes(), await settled(world) - traced
    finally:
        tracemalloc.stop()
    # Both times one of the pods that are there has two ranks. Which of them had the last requests differs, what fades of
    # these, and with which of them was compared: that says how many series a model has.
    differs = ("tasks", "pending_blocks", "recent_blocks", "series of models", "series of pods")
    assert before == {**after, **{name: before[name] for name in differs}}
    assert after["series of models"] < 20
    assert after["series of pods"] < 1.2 * before["series of pods"]
    assert after["recent_blocks"] < 50
    assert grown < 250_000, f"{grown} bytes for 748 pods"

    for number in range(1000 - PRESENT, 1000):
        world.service.leave(world.name(number))
    await settled(world)
    # Decisions are kept, as many as configured. So are the counts of the configured model, and when each began.
    kept = {"decisions": 100, "series of models": 2}
    assert world.sizes() == empty | kept


async def test_what_is_kept_of_pods_that_are_there_shows_in_the_metrics(world: World) -> None:
    world.come(1)
    request = await world.ask("m")
    shown = world.service.metrics.registry.get_sample_value
    parts = ("decisions", "recent_blocks", "pending_blocks", "drift_endpoints", "parity_samples")
    await world.end(request)
    kept = [shown("matrixinfer_kept_entries", {"part": part}) for part in parts]
    assert kept == [1, 2, 2, 1, 0]
    assert (shown("matrixinfer_kv_ledger_bytes", {"pod": "pod-1"}) or 0) > 10 * 4 * SIZE
