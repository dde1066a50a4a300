"""What writers tell of the pods that they follow, as others read it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
import structlog

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout
from matrixinfer.index.redis.store import Store, unavailable
from matrixinfer.tasks import cancel_and_wait

POLL_SECONDS = 1.0
MAX_PODS = 10_000
"""States that are read at most."""

log = structlog.get_logger(__name__)


class PodState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a writer believes a pod's events, and what it learned of its blocks. Unknown fields are ignored."""

    trust: str
    """`exact`, `partial`, `stale` or `none`."""
    feed: str
    """State of the feed."""
    model: str
    """The index's name of the engine's base model."""
    engine_block: int | None = None
    """Tokens per engine block."""
    tiers: tuple[str, ...] = ()
    """Names under which the index holds what is on each faster tier, the fastest first."""
    has_tails: bool = False
    hides_salts: bool = False
    reason: str | None = None
    """Why the events are not believed."""


class PodStates:
    """Reads the states of all pods every second. Use as an async context manager; it owns one task.

    `scheme` is what this process expects of the blocks of every model (`index.scheme_of`).
    """

    def __init__(
        self,
        store: Store,
        scheme: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.time,
        models: Callable[[], list[str]] = list,
    ) -> None:
        self.foreign: dict[str, Mapping[str, str]] = {}
        """Models whose blocks in Redis are made otherwise, and how: they never match."""
        self._store = store
        self._scheme = scheme
        self._clock = clock
        self._models = models
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
        """What is told of a pod."""
        return self._states.get(pod)

    @property
    def pods(self) -> list[str]:
        """Of which something is told."""
        return list(self._states)

    def is_alive(self, pod: str) -> bool:
        """Whether its writer has lately given a sign of life, and was heard."""
        return self._leases.get(pod, 0) >= self._clock()

    async def read(self) -> None:
        """Read once. Raises `IndexUnavailable`."""
        client: Any = self._store.client
        with unavailable():
            states = await self._store.ask(client.hgetall(layout.STATES))
            leases = await self._store.ask(client.hgetall(layout.LEASES))
            self._states = {
                layout.text_of(pod): state for pod, text in list(states.items())[:MAX_PODS] if (state := decode(text))
            }
            self._leases = {layout.text_of(pod): layout.number(text) or 0 for pod, text in leases.items()}
            for model in self._models():
                told = await self._store.ask(client.hgetall(layout.meta_key(model)))
                self._compare(
                    model, {layout.text_of(name): value.decode("utf-8", "replace") for name, value in told.items()}
                )

    def _compare(self, model: str, told: Mapping[str, str]) -> None:
        """Say so once when a model's blocks are made otherwise; where nobody tells, nothing is known."""
        differs = {name: told[name] for name, value in self._scheme.items() if name in told and told[name] != value}
        if not differs:
            self.foreign.pop(model, None)
            return
        if self.foreign.get(model) != told:
            log.warning("redis_scheme_differs", model=model, there=dict(told), here=dict(self._scheme))
        self.foreign[model] = dict(told)

    async def _run(self) -> None:
        while True:
            try:
                await self.read()
                self._failed = False
            except IndexUnavailable as error:
                if not self._failed:
                    log.warning("redis_states_unread", server=self._store.config.where, error=str(error))
                self._failed = True
            except Exception:
                # Supervision boundary: what is told of pods is read again whatever one answer was.
                log.exception("redis_states_failed")
            await asyncio.sleep(POLL_SECONDS)


def encode(state: PodState) -> str:
    """As JSON."""
    return msgspec.json.encode(state).decode()


def decode(text: bytes) -> PodState | None:
    """What a writer told; None for what is no such thing."""
    try:
        return msgspec.json.decode(text, type=PodState)
    except msgspec.MsgspecError:
        return None
