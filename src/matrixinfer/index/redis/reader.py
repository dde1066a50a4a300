"""Lookups in Redis: one round trip as a rule, with a deadline and a circuit breaker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import structlog

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout, scripts
from matrixinfer.index.redis.circuit import Circuit, State
from matrixinfer.index.redis.store import Script, ScriptsRefused, Store, unavailable

CHUNK = 512
"""Blocks per round trip. Longer prompts need another round trip only if a pod holds all of these."""
LAST_CHUNK = 4_096
"""Blocks per round trip of `last` by script, which stops by itself: more would keep the server busy for milliseconds."""
FIRST_LAST_CHUNK = 64
"""Blocks in the first round trip of `last` by pipeline, which reads them all. The next ones are twice as large each."""

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
    """Counts consecutive blocks per pod, and finds the last of some blocks. `max_age` is in seconds; `clock` returns Unix seconds."""

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
        self._match = Script(scripts.MATCH)
        self._last = Script(scripts.LAST)

    @property
    def circuit(self) -> State:
        """State of the circuit breaker."""
        return self._circuit.state

    async def match(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """How many of `hashes` each pod holds, consecutively from the start. Raises `IndexUnavailable`."""
        counts: dict[str, int] = {}
        if hashes:
            await self._in_time(partial(self._count, model, hashes, counts), counts)
        return counts

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> dict[str, int]:
        """The position in `hashes` of the last block that each of `pods` holds. Raises `IndexUnavailable`."""
        places: dict[str, int] = {}
        names = sorted({layout.canonical(pod) for pod in pods})
        if hashes and names:
            await self._in_time(partial(self._find_last, model, names, hashes, places), places)
        return places

    async def _in_time(self, ask: Callable[[], Awaitable[None]], answer: Mapping[str, int]) -> None:
        """Await `ask`, which fills `answer`, within the deadline. Raises `IndexUnavailable`."""
        if not self._circuit.admits():
            self.stats.outcomes["refused"] += 1
            raise IndexUnavailable(f"{self._store.config.where} has failed repeatedly, so it is not asked for a while")
        began = self._monotonic()
        try:
            async with asyncio.timeout(self._store.config.deadline_seconds), self._slots:
                await ask()
        except TimeoutError as error:
            if answer:  # the first chunks of a long prompt were answered; that is a valid lower bound
                return self._answered("late")
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
        return self._answered("answered")

    def _answered(self, outcome: str) -> None:
        if self._circuit.state != "closed":
            log.info("redis_circuit_closed", server=self._store.config.where)
        self._circuit.succeeded()
        self.stats.outcomes[outcome] += 1

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

    async def _find_last(self, model: str, pods: Sequence[str], hashes: Sequence[int], places: dict[str, int]) -> None:
        """Fill `places` chunk by chunk, from the end of `hashes`."""
        left, upto, size = list(pods), len(hashes), FIRST_LAST_CHUNK
        while left and upto:
            start = max(0, upto - (LAST_CHUNK if self._scripted else size))
            found = await self._ask_last(model, left, hashes[start:upto])
            places.update((pod, start + position) for pod, position in found.items())
            left = [pod for pod in left if pod not in found]
            upto, size = start, min(2 * size, CHUNK)

    async def _ask(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        return await self._by_either(
            partial(self._by_script, self._match, model, hashes, ()), partial(self._by_pipeline, model, hashes)
        )

    async def _ask_last(self, model: str, pods: Sequence[str], hashes: Sequence[int]) -> dict[str, int]:
        return await self._by_either(
            partial(self._by_script, self._last, model, hashes, pods),
            partial(self._last_by_pipeline, model, pods, hashes),
        )

    async def _by_either(
        self, by_script: Callable[[], Awaitable[dict[str, int]]], by_pipeline: Callable[[], Awaitable[dict[str, int]]]
    ) -> dict[str, int]:
        """Ask by script where the server runs scripts, and by pipeline otherwise."""
        if self._scripted:
            try:
                return await by_script()
            except ScriptsRefused as error:
                log.warning("redis_scripts_refused", server=self._store.config.where, error=str(error))
                self._scripted = False
        return await by_pipeline()

    async def _by_script(
        self, script: Script, model: str, hashes: Sequence[int], pods: Sequence[str]
    ) -> dict[str, int]:
        now = self._clock()
        args = (layout.prefix_of(model), now, int(now - self._max_age), " ".join(map(str, hashes)))
        found = await self._store.run(script, (layout.EPOCHS, layout.LEASES), (*args, *pods))
        with unavailable():
            return layout.pairs(found)

    async def _by_pipeline(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """Do what the script does, but fetch every block; on Cluster, each from the server that has its slot."""
        with unavailable():
            return layout.count(*await self._fetch(model, hashes))

    async def _last_by_pipeline(self, model: str, pods: Sequence[str], hashes: Sequence[int]) -> dict[str, int]:
        with unavailable():
            return layout.last(*await self._fetch(model, hashes), pods)

    async def _fetch(self, model: str, hashes: Sequence[int]) -> tuple[list[layout.Entries], dict[str, int], int]:
        """The entries of blocks, the smallest stamps that count, by pod, and the one of other pods."""
        now, prefix = self._clock(), layout.prefix_of(model)
        pipeline: Any = self._store.client.pipeline(transaction=False)
        pipeline.hgetall(layout.EPOCHS)
        pipeline.hgetall(layout.LEASES)
        for block in hashes:
            pipeline.hgetall(f"{prefix}{block}")
        epochs, leases, *blocks = await pipeline.execute()
        floors = layout.floors(epochs, leases, now=now, max_age=self._max_age)
        return cast("list[layout.Entries]", blocks), floors, int(now - self._max_age)
