"""Polls every pod for its health, models, publishers of KV events and load."""

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
"""Longest pause between polls of a pod that is down, unless the configured interval is longer."""

log = structlog.get_logger(__name__)


class PodWatcher:
    """Runs one task per pod. Use as an async context manager; call `watch` and `unwatch` as pods come and go.

    `on_discovered` is called with a pod whenever it reports new models or publishers, `on_measured` at every reading.
    A pod that was down is discovered again as soon as it answers, because it may be another engine.
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
        """Start a task for every pod in the registry."""
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
        """Start polling a pod that is not being polled yet."""
        self._tasks[pod.name] = self._group.create_task(self._watch(pod), name=f"watch {pod.name}")

    def unwatch(self, name: str) -> None:
        """Stop polling a pod that has left the registry. No effect if it is not being polled."""
        if name not in self._tasks:
            return
        self._tasks.pop(name).cancel()
        self._announced.pop(name, None)
        self._stop_waiting_for(name)

    async def first_round(self, seconds: float) -> bool:
        """Wait up to `seconds` until every pod has answered once. Returns False if some have not."""
        if not self._silent:
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._all_answered.wait()
        except TimeoutError:
            log.warning("pods_wait_timed_out", pods=sorted(self._silent))
            return False
        return True

    async def _watch(self, pod: Pod) -> None:
        """Poll one pod forever."""
        clock = self._registry.clock
        discover_at = clock()
        was_healthy: bool | None = None
        while True:
            reason: str | None = None
            try:
                if clock() >= discover_at or not pod.healthy:
                    await self._discover(pod)
                    discover_at = clock() + self._config.discovery_interval_seconds
                # `/metrics` answers even after the engine behind the API has died, so check the health first.
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
                # Supervision boundary: an error while polling one pod must not end the gateway.
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
        reported = (pod.served, pod.kv_sources)
        if served is not None and reported != self._announced.get(pod.name):
            if self._on_discovered is not None:
                self._on_discovered(pod)
            self._announced[pod.name] = reported
            log.info("pod_discovered", pod=pod.name, model=served.base_model, adapters=sorted(served.adapters))

    def _answered(self, pod: Pod) -> None:
        self._registry.answered(pod.name)
        self._stop_waiting_for(pod.name)

    def _stop_waiting_for(self, name: str) -> None:
        """`first_round` need not wait for this pod any longer."""
        self._silent.discard(name)
        if not self._silent:
            self._all_answered.set()

    def _delay(self, pod: Pod) -> float:
        """Seconds until the next poll: the interval, doubled per failure up to a bound, ± 10 % to spread the polls."""
        interval = self._config.scrape_interval_seconds
        back_off = min(interval * 2.0 ** min(pod.failures, 16), max(interval, MAX_BACK_OFF_SECONDS))
        return back_off * random.uniform(0.9, 1.1)  # noqa: S311 - spreads polls, no security purpose

    def _log_health(self, pod: Pod, reason: str | None) -> None:
        if not pod.healthy:
            log.warning("pod_went_down", pod=pod.name, reason=reason)
            return
        log.info("pod_came_up", pod=pod.name, model=pod.base_model)
        if pod.served is None:
            log.warning("pod_models_withheld", pod=pod.name, note="it only gets requests for configured models")
