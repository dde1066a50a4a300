"""Watches every pod: what it serves, where it publishes its KV events, whether it answers, how loaded it is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import TracebackType
from typing import Self

import aiohttp
import structlog

from matrixinfer.config import PodWatchConfig
from matrixinfer.pods.engine_api import EngineApi, EngineDown
from matrixinfer.pods.registry import EngineMetrics, Pod, PodRegistry

MAX_BACK_OFF_SECONDS = 5.0
"""A pod that is down is looked at no less often, unless the interval itself is longer."""

log = structlog.get_logger(__name__)


class PodWatcher:
    """One task per pod while the context is open; `watch` and `unwatch` as pods come and go within it.

    `on_discovered` is called with a pod whenever what it tells about itself is new, and `on_measured` at every reading.
    A pod that was down is asked anew as soon as it answers: it may be another engine.
    """

    def __init__(
        self,
        registry: PodRegistry,
        session: aiohttp.ClientSession,
        config: PodWatchConfig,
        *,
        on_discovered: Callable[[Pod], None] | None = None,
        on_measured: Callable[[Pod, EngineMetrics], None] | None = None,
    ) -> None:
        self._registry = registry
        self._api = EngineApi(session, config.scrape_timeout_seconds)
        self._config = config
        self._on_discovered = on_discovered
        self._on_measured = on_measured
        self._announced: dict[str, object] = {}
        self._silent = {pod.name for pod in registry.pods}
        self._all_answered = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        """Start watching."""
        await self._group.__aenter__()
        for pod in self._registry.pods:
            self.watch(pod)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            task.cancel()
        # The group must not see the caller's error: it would wrap it in an exception group.
        await self._group.__aexit__(None, None, None)

    def watch(self, pod: Pod) -> None:
        """Look at a pod from now on, which is not looked at yet."""
        self._tasks[pod.name] = self._group.create_task(self._watch(pod), name=f"watch {pod.name}")

    def unwatch(self, name: str) -> None:
        """A pod has left the registry. Nothing happens where it is not looked at."""
        if name not in self._tasks:
            return
        self._tasks.pop(name).cancel()
        self._announced.pop(name, None)
        self._heard(name)

    async def first_round(self, seconds: float) -> bool:
        """Wait until every pod has answered once, at most `seconds`. False when some have not."""
        if not self._silent:
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._all_answered.wait()
        except TimeoutError:
            log.warning("pods_silent", pods=sorted(self._silent))
            return False
        return True

    async def _watch(self, pod: Pod) -> None:
        """Look at one pod for ever."""
        clock = self._registry.clock
        discover_at = clock()
        was_healthy: bool | None = None
        while True:
            reason: str | None = None
            try:
                if clock() >= discover_at or not pod.healthy:
                    await self._discover(pod)
                    discover_at = clock() + self._config.discovery_interval_seconds
                # Its metrics answer even where the engine behind the API has died.
                await self._api.check(pod.url)
                metrics = await self._api.metrics(pod.url, now=clock())
                self._registry.measured(pod.name, metrics)
                if self._on_measured is not None:
                    self._on_measured(pod, metrics)
                self._answered(pod)
            except EngineDown as error:
                reason = str(error)
                self._registry.failed(pod.name)
            except Exception as error:
                # Supervision boundary: a fault in reading one pod must not end the gateway.
                log.exception("pod_watch_failed", pod=pod.name)
                reason = type(error).__name__
                self._registry.failed(pod.name)
            if pod.healthy is not was_healthy:
                was_healthy = pod.healthy
                self._log_health(pod, reason)
            await asyncio.sleep(self._delay(pod))

    async def _discover(self, pod: Pod) -> None:
        served = await self._api.models(pod.url)
        sources = await self._api.kv_sources(pod.url) if pod.config.kv_events == "discover" else None
        self._registry.learn(pod.name, served=served, kv_sources=sources)
        told = (pod.served, pod.kv_sources)
        if served is not None and told != self._announced.get(pod.name):
            if self._on_discovered is not None:
                self._on_discovered(pod)
            self._announced[pod.name] = told
            log.info("pod_discovered", pod=pod.name, model=served.base_model, adapters=sorted(served.adapters))

    def _answered(self, pod: Pod) -> None:
        self._registry.answered(pod.name)
        self._heard(pod.name)

    def _heard(self, name: str) -> None:
        """Nobody need wait for a pod any more."""
        self._silent.discard(name)
        if not self._silent:
            self._all_answered.set()

    def _delay(self, pod: Pod) -> float:
        """Seconds until the next look: the interval, doubled per failure up to a bound, ± 10 % so that looks spread."""
        interval = self._config.scrape_interval_seconds
        back_off = min(interval * 2.0 ** min(pod.failures, 16), max(interval, MAX_BACK_OFF_SECONDS))
        return back_off * random.uniform(0.9, 1.1)  # noqa: S311 - spreads reads, protects nothing

    def _log_health(self, pod: Pod, reason: str | None) -> None:
        if not pod.healthy:
            log.warning("pod_down", pod=pod.name, reason=reason)
        elif pod.served is None:
            log.warning("pod_up", pod=pod.name, note="it does not tell its models; it serves configured ones only")
        else:
            log.info("pod_up", pod=pod.name, model=pod.served.base_model)
