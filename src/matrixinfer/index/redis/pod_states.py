"""Reads the states that writers publish for the pods that they follow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import msgspec
import structlog

from matrixinfer.errors import UNREADABLE, IndexUnavailable
from matrixinfer.index.redis import layout
from matrixinfer.index.redis.store import Store, unavailable
from matrixinfer.tasks import cancel_and_wait

POLL_SECONDS = 1.0
MAX_PODS = 10_000
"""Limit of states to read."""

log = structlog.get_logger(__name__)


class PodState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A writer's trust in a pod's events, and what it knows about the pod's blocks. Unknown fields are ignored."""

    trust: str
    """`exact`, `partial`, `stale` or `none`."""
    feed: str
    """State of the writer's feed of the pod's events."""
    model: str
    """The index's name of the engine's base model."""
    engine_block: int | None = None
    """Tokens per engine block."""
    tiers: tuple[str, ...] = ()
    """Names under which the index lists the blocks of each faster tier, fastest first."""
    has_tails: bool = False
    """Whether the index also has tails: ends of engine blocks that do not fill a block."""
    hides_salts: bool = False
    """Whether the events do not report cache salts."""
    rule: tuple[int, int, int, int, bool] | None = None
    """How reusable prefixes are found (`index.ends.Rule`), where not every prefix that the pod holds is reused."""
    drop: int = 0
    """Tokens by which the engine cuts every prefix that it holds before it reuses it."""
    footprint: tuple[int, int, int] | None = None
    """Tokens that the cache holds, the most that it has held, and what it has evicted so far, in steps of a hundredth."""
    reason: str | None = None
    """Why the events are not trusted."""
    limits: tuple[str, ...] = ()
    """What the events cannot tell, and why they are not believed exactly, in words."""


class PodStates:
    """Reads the states of all pods every second. Use as an async context manager; it owns one task.

    `scheme` describes how this process hashes blocks (`index.scheme_of`); the schemes of `models` are compared with it.
    `redis_name` returns a model's name in Redis. `clock` returns Unix seconds.
    """

    def __init__(
        self,
        store: Store,
        scheme: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.time,
        models: Callable[[], list[str]] = list,
        redis_name: Callable[[str], str] = str,
    ) -> None:
        self.foreign: dict[str, Mapping[str, str]] = {}
        """Models whose blocks in Redis use another scheme, and that scheme. Their blocks never match."""
        self._store = store
        self._scheme = scheme
        self._clock = clock
        self._models = models
        self._redis_name = redis_name
        self._states: dict[str, PodState] = {}
        self._leases: dict[str, int] = {}
        self._failed = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="redis-states")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_and_wait(self._task)

    def of(self, pod: str) -> PodState | None:
        """The last published state of a pod, or None."""
        return self._states.get(pod)

    @property
    def pods(self) -> list[str]:
        """The pods with a published state."""
        return list(self._states)

    def is_alive(self, pod: str) -> bool:
        """Whether the lease of the pod's writer is still valid, according to the last read."""
        return self._leases.get(pod, 0) >= self._clock()

    async def read(self) -> None:
        """Read all states once. Raises `IndexUnavailable`."""
        with unavailable():
            states, leases = await self._store.table(layout.STATES), await self._store.table(layout.LEASES)
            self._states = {
                layout.text_of(pod): state for pod, text in list(states.items())[:MAX_PODS] if (state := decode(text))
            }
            self._leases = {layout.text_of(pod): layout.number(text) or 0 for pod, text in leases.items()}
            for model in self._models():
                meta = await self._store.table(layout.meta_key(self._redis_name(model)))
                self._compare(
                    model, {layout.text_of(name): value.decode("utf-8", "replace") for name, value in meta.items()}
                )

    def _compare(self, model: str, there: Mapping[str, str]) -> None:
        """Log once if a model's scheme in Redis differs. Missing fields do not count as different."""
        differs = {name for name, value in self._scheme.items() if there.get(name, value) != value}
        if not differs:
            self.foreign.pop(model, None)
            return
        if self.foreign.get(model) != there:
            log.warning("redis_scheme_differed", model=model, there=dict(there), here=dict(self._scheme))
        self.foreign[model] = dict(there)

    async def _run(self) -> None:
        while True:
            try:
                await self.read()
                self._failed = False
            except IndexUnavailable as error:
                if not self._failed:
                    log.warning("redis_states_read_failed", server=self._store.config.where, error=str(error))
                self._failed = True
            except Exception:
                # Supervision boundary: an unexpected answer must not end the task.
                log.exception("redis_states_crashed")
            await asyncio.sleep(POLL_SECONDS)


def encode(state: PodState) -> str:
    """The state as JSON."""
    return msgspec.json.encode(state).decode()


def decode(text: bytes) -> PodState | None:
    """Parse a published state; None if it is invalid."""
    try:
        return msgspec.json.decode(text, type=PodState)
    except UNREADABLE:
        return None
