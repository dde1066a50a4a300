"""Reads the configuration again while the gateway runs: everything that has changed takes effect, or nothing does."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.app.file_watch import FileWatch
from matrixinfer.config import Config
from matrixinfer.config.difference import changed_keys
from matrixinfer.config.reload import needs_restart
from matrixinfer.errors import MatrixInferError
from matrixinfer.tasks import cancel_and_wait

Trigger: TypeAlias = Literal["signal", "file", "admin"]
Result: TypeAlias = Literal["applied", "unchanged", "refused", "failed"]
Apply: TypeAlias = Callable[[Config], Awaitable[None]]
"""Lets a configuration take effect, completely, or raises and changes nothing."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one attempt."""

    result: Result
    generation: int
    """Which configuration is in effect now: 1 is that of the start."""
    changed: Sequence[str] = ()
    """Keys that differ from those in effect before."""
    restart: Sequence[str] = ()
    """Those of them that need a restart, because of which nothing was changed."""
    error: str | None = None


class Reloader:
    """Reads with `read`, and lets `apply` put it into effect. Use as an async context manager: it owns the task.

    `file` is looked at as `config.reload` says. `on_begin` and `on_end` are called around every attempt.
    """

    def __init__(
        self,
        config: Config,
        read: Callable[[], Config],
        apply: Apply,
        *,
        file: Path | None = None,
        on_begin: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        """The one in effect."""
        self.generation = 1
        self.applied_at = clock()
        """When it took effect, in Unix seconds."""
        self.counts: Counter[Result] = Counter()
        self._read = read
        self._apply = apply
        self._file = file
        self._on_begin = on_begin
        self._on_end = on_end
        self._clock = clock
        self._lock = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="reload")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_and_wait(self._task)

    def reload_soon(self) -> None:
        """A signal asks for it."""
        self._wanted.set()

    async def reload(self, trigger: Trigger) -> Outcome:
        """Read the configuration and put it into effect if all of it may change now. One attempt at a time."""
        async with self._lock:
            self._on_begin()
            try:
                outcome = await self._attempt()
            finally:
                self._on_end()
        self.counts[outcome.result] += 1
        self._log(trigger, outcome)
        return outcome

    async def _attempt(self) -> Outcome:
        try:
            config = await asyncio.to_thread(self._read)
            changed = changed_keys(self.config, config)
            restart = [key for key in changed if needs_restart(key)]
            if restart or not changed:
                result: Result = "refused" if restart else "unchanged"
                return Outcome(result=result, generation=self.generation, changed=changed, restart=restart)
            await self._apply(config)
        except MatrixInferError as error:
            return Outcome(result="failed", generation=self.generation, error=str(error))
        self.config = config
        self.generation += 1
        self.applied_at = self._clock()
        return Outcome(result="applied", generation=self.generation, changed=changed)

    def _log(self, trigger: Trigger, outcome: Outcome) -> None:
        if outcome.result == "applied":
            log.info("config_reloaded", trigger=trigger, changed=outcome.changed, generation=outcome.generation)
        elif outcome.result == "refused":
            log.warning(
                "config_reload_refused", trigger=trigger, needs_restart=outcome.restart, changed=outcome.changed
            )
        elif outcome.result == "failed":
            log.warning("config_reload_failed", trigger=trigger, error=outcome.error)
        elif trigger != "file":
            log.info("config_unchanged", trigger=trigger, generation=outcome.generation)

    async def _run(self) -> None:
        watch = None if self._file is None else FileWatch(self._file)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.config.reload.interval_seconds):
                    await self._wanted.wait()
            try:
                if self._wanted.is_set():
                    self._wanted.clear()
                    await self.reload("signal")
                elif watch is not None and self.config.reload.watch and await watch.has_changed():
                    await self.reload("file")
            except Exception:
                # Supervision boundary: the configuration in effect goes on.
                log.exception("config_reload_crashed")


class ReloadCollector(Collector):
    """Which configuration is in effect, and what became of attempts to change it."""

    def __init__(self, reloader: Reloader | None) -> None:
        self._reloader = reloader

    def collect(self) -> Iterator[Metric]:
        """Read the state now."""
        reloader = self._reloader
        yield GaugeMetricFamily(
            "matrixinfer_config_generation",
            "Number of the configuration in effect; that of the start is 1.",
            value=1 if reloader is None else reloader.generation,
        )
        yield GaugeMetricFamily(
            "matrixinfer_config_applied_timestamp_seconds",
            "Unix time at which the configuration in effect was applied.",
            value=0 if reloader is None else reloader.applied_at,
        )
        reloads = CounterMetricFamily("matrixinfer_config_reloads", "Attempts to reload, by result.", labels=["result"])
        for result in ("applied", "unchanged", "refused", "failed"):
            reloads.add_metric([result], 0 if reloader is None else reloader.counts[result])
        yield reloads
