"""Lookups in Redis: one round trip as a rule, with a deadline and a circuit breaker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import structlog

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout, match_script, read_scripts
from matrixinfer.index.redis.circuit import Circuit, State
from matrixinfer.index.redis.match_script import BUDGET, CROWDED, CUT, MOST_HOLDERS
from matrixinfer.index.redis.store import Script, ScriptsRefused, Store, is_wrong_type, unavailable

CHUNK = 512
"""Blocks per round trip. Longer prompts need another round trip only if a pod holds all of these."""
LAST_CHUNK = 4_096
"""Blocks per round trip of `last` by script, which stops by itself: more would keep the server busy for milliseconds."""
FIRST_LAST_CHUNK = 64
"""Blocks in the first round trip of `last` by pipeline, which reads them all. The next ones are twice as large each."""

MAX_NAMES = 1_000
"""Pods that a lookup looks for by name, where blocks have too many holders to be read whole."""
CROWDED_SECONDS = 60.0
"""How long a model is looked up by name after that."""

NO_BUDGET = 2**53
_RESERVED = 4
"""Connections that lookups leave free for the writer, pod states and peers."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


OUTCOMES = ("answered", "capped", "late", "failed", "refused")
"""`capped`: only a part was read, so matches may be longer. `late`: the deadline passed. `refused`: the server was not asked
because the circuit was open."""


@dataclass(slots=True)
class ReaderStats:
    """Lookups since the start."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    """Number of lookups by outcome."""
    seconds: float = 0.0
    """Total duration of all lookups."""


class BlockReader:
    """Counts consecutive blocks per pod, and finds the last of some blocks.

    `max_age` is in seconds; `clock` returns Unix seconds. `starts` returns when engines started, in Unix seconds by pod, as
    far as that is known and nobody vouches for what the pod holds. `endpoints` returns the names to look for where blocks
    have more than `MOST_HOLDERS` holders; without it such blocks are read whole. `prefix_closed` says that this project's
    writers only write chained blocks, so that an entry of a living one proves all blocks before it (`match_script`).
    """

    def __init__(
        self,
        store: Store,
        *,
        max_age: float,
        prefix_closed: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        starts: Callable[[], Mapping[str, float]] = dict,
        endpoints: Callable[[], Collection[str]] | None = None,
    ) -> None:
        self.stats = ReaderStats()
        self._starts = starts
        self._endpoints = endpoints
        self._crowded: dict[str, float] = {}
        """Models that are looked up by name, and until when."""
        self._store = store
        self._max_age = max_age
        self._prefix_closed = prefix_closed
        self._clock = clock
        self._monotonic = monotonic
        self._circuit = Circuit(monotonic)
        self._slots = asyncio.Semaphore(max(1, store.config.connections - _RESERVED))
        self._scripted = store.config.scripts and not store.is_cluster
        self._match = Script(match_script.MATCH)
        self._last = Script(read_scripts.LAST)

    @property
    def circuit(self) -> State:
        """State of the circuit breaker."""
        return self._circuit.state

    async def match(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        """How many of `hashes` each pod holds, consecutively from the start. Raises `IndexUnavailable`."""
        counts: dict[str, int] = {}
        if hashes:
            await self._in_time(partial(self._count, model, hashes, counts), model, counts)
        return counts

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> dict[str, int]:
        """The position in `hashes` of the last block that each of `pods` holds. Raises `IndexUnavailable`."""
        places: dict[str, int] = {}
        names = sorted({layout.canonical(pod) for pod in pods})
        if hashes and names:
            await self._in_time(partial(self._find_last, model, names, hashes, places), model, places)
        return places

    async def _in_time(self, ask: Callable[[], Awaitable[bool]], model: str, answer: Mapping[str, int]) -> None:
        """Await `ask`, which fills `answer`, within the deadline. Raises `IndexUnavailable`."""
        if not self._circuit.admits():
            self.stats.outcomes["refused"] += 1
            raise IndexUnavailable(f"{self._store.config.where} has failed repeatedly, so it is not asked for a while")
        began = self._monotonic()
        try:
            async with asyncio.timeout(self._store.config.deadline_seconds), self._slots:
                whole = await ask()
        except TimeoutError as error:
            if not self._scripted:  # a pipeline cannot know beforehand how many holders it will read
                self._look_by_name(model)
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
        return self._answered("answered" if whole else "capped")

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

    def _look_by_name(self, model: str) -> None:
        """For a while look only for the known endpoints, because blocks have too many holders to be read whole."""
        if self._endpoints is None:
            return
        now, names = self._monotonic(), len(self._endpoints())
        if self._crowded.get(model, 0.0) <= now:
            looked_for = min(names, MAX_NAMES)
            log.warning("redis_lookup_capped", model=model, endpoints=names, looked_for=looked_for)
        self._crowded = {name: until for name, until in self._crowded.items() if until > now}
        self._crowded[model] = now + CROWDED_SECONDS

    def _names(self, model: str) -> tuple[Sequence[str], bool]:
        """The names to look for, if blocks of the model have too many holders; and whether these are all endpoints."""
        if self._endpoints is None or self._crowded.get(model, 0.0) <= self._monotonic():
            return (), True
        names = sorted(self._endpoints())
        return names[:MAX_NAMES], len(names) <= MAX_NAMES

    async def _count(self, model: str, hashes: Sequence[int], counts: dict[str, int]) -> bool:
        """Fill `counts` chunk by chunk. Returns False if some of it was not read."""
        whole = True
        for start in range(0, len(hashes), CHUNK):
            asked = hashes[start : start + CHUNK]
            found, is_whole = await self._ask(model, asked)
            whole = whole and is_whole
            continuing = {pod: held for pod, held in found.items() if counts.get(pod, 0) == start}
            counts.update((pod, start + held) for pod, held in continuing.items())
            if max(continuing.values(), default=0) < len(asked):
                break
        return whole

    async def _find_last(self, model: str, pods: Sequence[str], hashes: Sequence[int], places: dict[str, int]) -> bool:
        """Fill `places` chunk by chunk, from the end of `hashes`."""
        left, upto, size = list(pods), len(hashes), FIRST_LAST_CHUNK
        while left and upto:
            start = max(0, upto - (LAST_CHUNK if self._scripted else size))
            found = await self._ask_last(model, left, hashes[start:upto])
            places.update((pod, start + position) for pod, position in found.items())
            left = [pod for pod in left if pod not in found]
            upto, size = start, min(2 * size, CHUNK)
        return True

    async def _ask(self, model: str, hashes: Sequence[int]) -> tuple[dict[str, int], bool]:
        """The matches, and whether all of them were read."""
        return await self._by_either(
            partial(self._match_by_script, model, hashes), partial(self._match_by_pipeline, model, hashes)
        )

    async def _ask_last(self, model: str, pods: Sequence[str], hashes: Sequence[int]) -> dict[str, int]:
        return await self._by_either(
            partial(self._last_by_script, model, pods, hashes), partial(self._last_by_pipeline, model, pods, hashes)
        )

    async def _by_either(self, by_script: Callable[[], Awaitable[T]], by_pipeline: Callable[[], Awaitable[T]]) -> T:
        """Ask by script where the server runs scripts, and by pipeline otherwise."""
        if self._scripted:
            try:
                return await by_script()
            except ScriptsRefused as error:
                log.warning("redis_scripts_refused", server=self._store.config.where, error=str(error))
                self._scripted = False
        return await by_pipeline()

    async def _match_by_script(self, model: str, hashes: Sequence[int]) -> tuple[dict[str, int], bool]:
        starts = [each for pod, at in self._starts().items() for each in (pod, int(at) + 1)]
        names, all_named = self._names(model)
        while True:
            most = 0 if self._endpoints is None else MOST_HOLDERS
            budget = BUDGET if most else NO_BUDGET
            more = (int(self._prefix_closed), most, budget, len(starts) // 2, *starts, *names)
            state, found = await self._run(self._match, model, hashes, more)
            if state != CROWDED or names:
                return found, all_named and state != CUT
            self._look_by_name(model)
            names, all_named = self._names(model)
            if not names:
                return {}, True

    async def _last_by_script(self, model: str, pods: Sequence[str], hashes: Sequence[int]) -> dict[str, int]:
        return (await self._run(self._last, model, hashes, pods))[1]

    async def _run(
        self, script: Script, model: str, hashes: Sequence[int], more: Sequence[str | int]
    ) -> tuple[int, dict[str, int]]:
        """The state that a script returns, and its pairs."""
        now = self._clock()
        args = (layout.prefix_of(model), now, int(now - self._max_age), match_script.packed(hashes), *more)
        answer = await self._store.run(script, (layout.EPOCHS, layout.LEASES), args)
        with unavailable():
            state, wrong, *found = answer
            if wrong:
                self._store.unreadable(layout.text_of(wrong))
            return int(state), layout.pairs(found)

    async def _match_by_pipeline(self, model: str, hashes: Sequence[int]) -> tuple[dict[str, int], bool]:
        """Do what the script does, but fetch every block; on Cluster, each from the server that has its slot."""
        names, all_named = self._names(model)
        with unavailable():
            blocks, floors = await self._fetch(model, hashes, names)
            if not names and any(len(entries) > MOST_HOLDERS for entries in blocks):
                self._look_by_name(model)
            return layout.count(blocks, floors), all_named

    async def _last_by_pipeline(self, model: str, pods: Sequence[str], hashes: Sequence[int]) -> dict[str, int]:
        with unavailable():
            return layout.last(*await self._fetch(model, hashes), pods)

    async def _fetch(
        self, model: str, hashes: Sequence[int], names: Sequence[str] = ()
    ) -> tuple[list[layout.Entries], layout.Floors]:
        """The entries of blocks, or only those of `names`; and which of them count."""
        now, prefix = self._clock(), layout.prefix_of(model)
        fields = [each.encode() for name in names for each in (name, name + layout.SUFFIX)]
        keys = [layout.EPOCHS, layout.LEASES, *(f"{prefix}{block}" for block in hashes)]
        pipeline: Any = self._store.client.pipeline(transaction=False)
        for key in keys[:2]:
            pipeline.hgetall(key)
        for key in keys[2:]:
            pipeline.hmget(key, fields) if fields else pipeline.hgetall(key)
        answers = await pipeline.execute(raise_on_error=False)
        for n, answer in enumerate(answers):
            if is_wrong_type(answer):
                self._store.unreadable(keys[n])
                answers[n] = {}
            elif isinstance(answer, Exception):
                raise answer
            elif fields and n > 1:
                answers[n] = {field: stamp for field, stamp in zip(fields, answer, strict=True) if stamp is not None}
        epochs, leases, *blocks = answers
        floors = layout.floors(epochs, leases, now=now, max_age=self._max_age, starts=self._starts())
        return cast("list[layout.Entries]", blocks), floors
