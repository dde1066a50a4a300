"""One data-parallel rank of an engine, with its own cache, model and publisher."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.cpu_tier import CpuTier
from matrixinfer.sim.driver import EngineDriver
from matrixinfer.sim.events import Event, EventBatch, encode
from matrixinfer.sim.model import EngineModel
from matrixinfer.sim.publisher import EventPublisher
from matrixinfer.sim.stats import EngineStats


class EngineRank:
    """Runs while its context is open."""

    def __init__(self, config: SimEngineConfig, number: int) -> None:
        self.number = number
        self._config = config
        self.driver = EngineDriver(self._new_model(), self._publish)
        self.publisher = EventPublisher(
            config.host,
            port=config.kv_port and config.kv_port + number,
            replay_port=config.replay_port and config.replay_port + number,
            topic=config.topic,
            buffer_batches=config.buffer_batches,
            loss=config.lose_frames,
            seed=config.seed + number,
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises `zmq.ZMQError` when a port is taken."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.publisher)
            group = await stack.enter_async_context(asyncio.TaskGroup())
            for work in (self.driver.run(), self.publisher.serve()):
                stack.callback(group.create_task(work).cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The task group must not see the caller's error: it would wrap it in an exception group.
        await self._stack.aclose()

    @property
    def stats(self) -> EngineStats:
        """The rank's counters."""
        return self.driver.model.stats

    def restart(self) -> None:
        """Restart on the same endpoints, with an empty cache and no history. Raises `RuntimeError` unless idle."""
        if self.driver.in_flight:
            raise RuntimeError("expected an idle engine, but requests are in flight")
        self.driver.model = self._new_model()
        self.publisher.restart()

    def _new_model(self) -> EngineModel:
        config = self._config
        cpu = None
        if config.cpu_blocks:
            cpu = CpuTier(config.cpu_blocks, lazy=config.lazy_offload, bare_events=config.bare_cpu_events)
        return EngineModel(
            PagedPrefixCache(config.num_blocks, config.block_size, cpu, prefix_caching=config.prefix_caching),
            config.timing,
            max_tokens=config.max_batched_tokens,
            max_sequences=config.max_sequences,
        )

    def _publish(self, events: list[Event]) -> None:
        self.publisher.publish(encode(EventBatch(time.time(), events, self.number)))


class Balancer:
    """Chooses a rank as vLLM does: the one with the fewest requests in flight, taking turns among equals."""

    def __init__(self, ranks: tuple[EngineRank, ...]) -> None:
        self._ranks = ranks
        self._turn = 0

    def choose(self) -> EngineRank:
        """Choose a rank for a request that names none."""
        order = self._ranks[self._turn :] + self._ranks[: self._turn]
        self._turn = (self._turn + 1) % len(order)
        return min(order, key=lambda rank: rank.driver.in_flight)
