"""Lookups in Redis: one round trip, with a deadline and a circuit breaker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import structlog

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout, scripts
from matrixinfer.index.redis.circuit import Circuit, State
from matrixinfer.index.redis.store import Script, ScriptsRefused, Store, unavailable

CHUNK = 512
"""Blocks per round trip. Longer prompts need another round trip only if a pod holds all of these."""

_RESERVED = 4
"""Connections that lookups leave free for the writer, pod states and peers."""

log = structlog.get_logger(__name__)


OUTCOMES = ("answered", "late", "failed", "refused")
"""`late`: the deadline passed. `refused`: the server was not asked because the circuit was open."""


@dataclass(slots=True)
class ReaderStats:
    """Lookups since the start."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    """Number of lookups by outcome."""
    seconds: float = 0.0
    """Total duration of all lookups."""


class BlockReader:
    """Counts consecutive blocks per pod. `max_age` is in seconds; `clock` returns Unix seconds."""

    def __init__(
        self,
        store: Store,
        *,
        max_age: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = ReaderStats()
        self._store = store
        self._max_age = max_age
        self._clock = clock
        self._monotonic = monotonic
        self._circuit = Circuit(monotonic)
        self._slots = asyncio.Semaphore(max(1, store.config.connections - _RESERVED))
        self._scripted = store.config.scripts and not store.is_cluster
        self._script = Script(scripts.MATCH)

    @property
    def circuit(self) -> State:
        """State of the circuit breaker."""
        return self._circuit.state

    async def match(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """How many of `hashes` each pod holds, consecutively from the start. Raises `IndexUnavailable`."""
        if not hashes:
            return {}
        if not self._circuit.admits():
            self.stats.outcomes["refused"] += 1
            raise IndexUnavailable(f"{self._store.config.where} has failed repeatedly, so it is not asked for a while")
        began = self._monotonic()
        counts: dict[str, int] = {}
        try:
            async with asyncio.timeout(self._store.config.deadline_seconds), self._slots:
                await self._count(model, hashes, counts)
        except TimeoutError as error:
            if counts:  # the first chunks of a long prompt were answered; that is a valid lower bound
                return self._answered("late", counts)
            self._failed("late")
            milliseconds = self._store.config.deadline_seconds * 1000
            raise IndexUnavailable(f"no answer from {self._store.config.where} within {milliseconds:g} ms") from error
        except IndexUnavailable:
            self._failed("failed")
            raise
        except BaseException:
            self._circuit.abandoned()
            raise
        finally:
            self.stats.seconds += self._monotonic() - began
        return self._answered("answered", counts)

    def _answered(self, outcome: str, counts: dict[str, int]) -> dict[str, int]:
        if self._circuit.state != "closed":
            log.info("redis_circuit_closed", server=self._store.config.where)
        self._circuit.succeeded()
        self.stats.outcomes[outcome] += 1
        return counts

    def _failed(self, outcome: str) -> None:
        self.stats.outcomes[outcome] += 1
        was_open = self._circuit.state != "closed"
        self._circuit.failed()
        if not was_open and self._circuit.state != "closed":
            log.warning("redis_circuit_opened", server=self._store.config.where)

    async def _count(self, model: str, hashes: Sequence[int], counts: dict[str, int]) -> None:
        """Fill `counts` chunk by chunk."""
        for start in range(0, len(hashes), CHUNK):
            asked = hashes[start : start + CHUNK]
            found = await self._ask(model, asked)
            continuing = {pod: held for pod, held in found.items() if counts.get(pod, 0) == start}
            counts.update((pod, start + held) for pod, held in continuing.items())
            if max(continuing.values(), default=0) < len(asked):
                break

    async def _ask(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        if self._scripted:
            try:
                return await self._by_script(model, hashes)
            except ScriptsRefused as error:
                log.warning("redis_scripts_refused", server=self._store.config.where, error=str(error))
                self._scripted = False
        return await self._by_pipeline(model, hashes)

    async def _by_script(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        now = self._clock()
        args = (layout.prefix_of(model), now, int(now - self._max_age), " ".join(map(str, hashes)))
        found = await self._store.run(self._script, (layout.EPOCHS, layout.LEASES), args)
        with unavailable():
            return layout.pairs(found)

    async def _by_pipeline(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """Do what the script does, but fetch every block; on Cluster, each from the server that has its slot."""
        now, prefix = self._clock(), layout.prefix_of(model)
        with unavailable():
            pipeline: Any = self._store.client.pipeline(transaction=False)
            pipeline.hgetall(layout.EPOCHS)
            pipeline.hgetall(layout.LEASES)
            for block in hashes:
                pipeline.hgetall(f"{prefix}{block}")
            epochs, leases, *blocks = await pipeline.execute()
            floors = layout.floors(epochs, leases, now=now, max_age=self._max_age)
            return layout.count(cast("list[layout.Entries]", blocks), floors, int(now - self._max_age))
