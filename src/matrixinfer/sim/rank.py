"""One data-parallel rank of an engine, with its own cache, model and publisher."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import msgspec

from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.cpu_tier import CpuTier
from matrixinfer.sim.driver import EngineDriver
from matrixinfer.sim.load_feed import LoadFeed
from matrixinfer.sim.model import EngineModel
from matrixinfer.sim.prefix_cache import Event, PrefixCache
from matrixinfer.sim.publisher import EventPublisher
from matrixinfer.sim.radix import RadixCache
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
        self.load_feed = None
        if config.load_feed:
            self.load_feed = LoadFeed(
                config, number, lambda: self.stats, config.load_port and config.load_port + number
            )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises `zmq.ZMQError` when a port is taken."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.publisher)
            work = [self.driver.run, self.publisher.serve]
            if self.load_feed is not None:
                stack.enter_context(self.load_feed)
                work.append(self.load_feed.run)
            group = await stack.enter_async_context(asyncio.TaskGroup())
            for task in work:
                stack.callback(group.create_task(task()).cancel)
            self._stack = stack.pop_all()
        self._publish_idle()
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
        self._publish_idle()

    def reset(self) -> bool:
        """Clear the cache; False while any block is in use."""
        done = self.driver.model.reset_prefix_cache()
        self._publish_idle()
        return done

    def _new_model(self) -> EngineModel[Any, Any]:
        config = self._config
        return EngineModel(
            new_cache(config), config.timing, max_tokens=config.max_batched_tokens, max_sequences=config.max_sequences
        )

    def _publish_idle(self) -> None:
        """SGLang publishes while it is idle; vLLM's events wait for the next step."""
        if self._config.flavor == "sglang":
            self.driver.publish_idle()

    def _publish(self, events: list[Event]) -> None:
        # Both engines send a batch as an array.
        self.publisher.publish(msgspec.msgpack.encode((time.time(), events, self.number)))


def new_cache(config: SimEngineConfig) -> PrefixCache[Any, Any]:
    """An empty cache of one rank."""
    if config.flavor == "sglang":
        pairs = config.speculative == "pairs"
        return RadixCache(config.num_blocks - 1, config.block_size, pairs=pairs, prefix_caching=config.prefix_caching)
    cpu = None
    if config.cpu_blocks:
        cpu = CpuTier(config.cpu_blocks, lazy=config.lazy_offload, bare_events=config.bare_cpu_events)
    return PagedPrefixCache(
        config.num_blocks, config.block_size, cpu, prefix_caching=config.prefix_caching, layout=config.layout
    )


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
