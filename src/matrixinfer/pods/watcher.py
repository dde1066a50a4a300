"""Polls every pod for its health, models, publishers of KV events and load."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self

import aiohttp
import structlog

from matrixinfer.config import PodWatchConfig
from matrixinfer.pods.boot import is_another_run
from matrixinfer.pods.engine_api import EngineApi, EngineDown, OutOfResources
from matrixinfer.pods.engine_kind import EngineFacts
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import EngineMetrics, Pod, PodRegistry, ServedNames

MAX_BACK_OFF_SECONDS = 5.0
"""Longest pause between polls of a pod that is down, unless the configured interval is longer."""
SOON_SECONDS = 0.1
"""Pause before a poll that was asked for, so that several wishes are one poll."""
RESTART_LOG_SECONDS = 60.0
"""Restarts of a pod are logged at most this often: behind one URL there may be several engines in turn."""
WITHHELD = (
    "it gets requests only if one model is configured; if it requires an API key, set `apiKeyFile` or `apiKeyEnv`, or name "
    "its `model`"
)

log = structlog.get_logger(__name__)


class _Reported(NamedTuple):
    served: ServedNames | None
    sources: tuple[KvSource, ...] | None
    facts: EngineFacts | None
    ranks: frozenset[int]


class PodWatcher:
    """Runs one task per pod. Use as an async context manager; call `watch` and `unwatch` as pods come and go.

    `on_discovered` is called with a pod whenever it reports new models, publishers or ranks, `on_measured` at every
    reading. A pod that has failed or restarted is asked what it is as soon as it answers, because it may be another
    engine; `on_asking` is called before every such question, and `on_told` after the answer. `on_restarted` is called when
    its metrics show another run of the engine, `on_shortage` when this process cannot ask, whatever the pod.
    """

    def __init__(
        self,
        registry: PodRegistry,
        session: aiohttp.ClientSession,
        config: PodWatchConfig,
        *,
        on_discovered: Callable[[Pod], None] | None = None,
        on_measured: Callable[[Pod, EngineMetrics], None] | None = None,
        on_asking: Callable[[Pod], None] = lambda _: None,
        on_told: Callable[[Pod], None] = lambda _: None,
        on_shortage: Callable[[str, str], None] = lambda _place, _what: None,
        on_restarted: Callable[[Pod], None] = lambda _: None,
    ) -> None:
        self._registry = registry
        self._api = EngineApi(session, config.scrape_timeout_seconds)
        self._config = config
        self._on_discovered = on_discovered
        self._on_measured = on_measured
        self._on_asking = on_asking
        self._on_told = on_told
        self._on_shortage = on_shortage
        self._on_restarted = on_restarted
        self._due: dict[str, asyncio.Event] = {}
        """By pod: set when the pod must be asked again what it is, without waiting for the next poll."""
        self._restart_logged: dict[str, float] = {}
        self._announced: dict[str, _Reported] = {}
        self._silent = {pod.name for pod in registry.pods}
        self._undecided = set(self._silent)
        """Pods that have neither answered nor failed yet."""
        self._heard = asyncio.Event()
        """Set whenever a pod has answered or failed for the first time, or has gone."""
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

    def reconfigure(self, config: PodWatchConfig) -> None:
        """Poll in this way from the next poll on."""
        self._config = config
        self._api.reconfigure(config.scrape_timeout_seconds)

    def watch(self, pod: Pod) -> None:
        """Start polling a pod that is not being polled yet."""
        self._due[pod.name] = asyncio.Event()
        self._tasks[pod.name] = self._group.create_task(self._watch(pod), name=f"watch {pod.name}")

    def unwatch(self, name: str) -> None:
        """Stop polling a pod that has left the registry. No effect if it is not being polled."""
        if name not in self._tasks:
            return
        self._tasks.pop(name).cancel()
        self._announced.pop(name, None)
        self._restart_logged.pop(name, None)
        del self._due[name]
        self._stop_waiting_for(name)

    def ask_again(self, name: str) -> None:
        """A pod may be another engine by now: ask it soon. No effect if it is not being polled."""
        if name in self._due:
            self._due[name].set()

    async def first_round(self, seconds: float, *, others_seconds: float | None = None) -> bool:
        """Wait up to `seconds` until every pod has answered or failed once. Returns False if some have not answered.

        Once a pod has answered, the others get `others_seconds`, if given: one that is dead must not delay the rest.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds) as scope:
                is_waiting_less = False
                while self._undecided:
                    self._heard.clear()
                    await self._heard.wait()
                    has_answer = len(self._silent) < len(self._registry.pods)
                    if has_answer and others_seconds is not None and not is_waiting_less:
                        is_waiting_less = True
                        loop = asyncio.get_running_loop()
                        scope.reschedule(min(scope.when() or math.inf, loop.time() + others_seconds))
        if self._silent:
            log.warning("pods_not_answered", pods=sorted(self._silent))
        return not self._silent

    async def _watch(self, pod: Pod) -> None:
        """Poll one pod forever."""
        clock, due = self._registry.clock, self._due[pod.name]
        discover_at = clock()
        is_suspect = True  # after a failure it may be another engine
        was_healthy: bool | None = None
        while True:
            reason: str | None = None
            try:
                if clock() >= discover_at or is_suspect or pod.failures or due.is_set():
                    due.clear()
                    await self._discover(pod)
                    is_suspect = False
                    discover_at = clock() + self._config.discovery_interval_seconds
                # `/metrics` answers even after the engine behind the API has died, so check the health first.
                await self._api.check(pod.url)
                await self._measure(pod)
                self._answered(pod)
            except OutOfResources as error:
                # Our fault, and it says nothing about the pod: it stays what it was.
                is_suspect = True
                self._on_shortage("watcher", str(error))
                await asyncio.sleep(self._delay(pod))
                continue
            except EngineDown as error:
                reason, is_suspect = str(error), True
                self._decided(pod.name)
                self._registry.failed(pod.name)
            except Exception as error:
                # Supervision boundary: an error while polling one pod must not end the gateway.
                log.exception("pod_watch_failed", pod=pod.name)
                reason, is_suspect = type(error).__name__, True
                self._registry.failed(pod.name)
            if pod.healthy is not was_healthy:
                was_healthy = pod.healthy
                self._log_health(pod, reason)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._delay(pod)):
                    await due.wait()
                    await asyncio.sleep(SOON_SECONDS)

    async def ask_models(self, pod: Pod) -> None:
        """Ask a pod which models it serves, and pass on what is new. May raise `EngineDown` and `OutOfResources`."""
        served, before = await self._api.models(pod.url), pod.served
        if served is None or pod.gone:
            return
        self._registry.learn(pod.name, served=served)
        if before is None or (before.base_model, before.root, before.engine) != (
            served.base_model,
            served.root,
            served.engine,
        ):
            self.ask_again(pod.name)  # it is another engine: have its watcher ask for the rest
        self._announce(pod)

    async def _discover(self, pod: Pod) -> None:
        self._on_asking(pod)
        served = await self._api.models(pod.url)
        about = await self._api.about(pod.url, None if served is None else served.engine)
        sources = about.sources if pod.config.kv_events == "discover" else None
        self._registry.learn(pod.name, served=served, facts=about.facts, kv_sources=sources)
        self._announce(pod)
        if sources is not None:
            self._on_told(pod)

    def _announce(self, pod: Pod) -> None:
        """Pass on what is new about a pod."""
        reported = _Reported(pod.served, pod.kv_sources, pod.facts, pod.ranks)
        before = self._announced.get(pod.name)
        if before == reported or (pod.served is None and not pod.kv_sources):
            return
        self._announced[pod.name] = reported
        try:
            if self._on_discovered is not None:
                self._on_discovered(pod)
        except BaseException:
            del self._announced[pod.name]  # the next answer is passed on again
            raise
        if pod.served is not None and (before is None or before[:3] != reported[:3]):
            log.info(
                "pod_discovered",
                pod=pod.name,
                model=pod.served.base_model,
                adapters=sorted(pod.served.adapters),
                engine=pod.engine,
                version=None if pod.facts is None else pod.facts.version,
            )

    async def _measure(self, pod: Pod) -> None:
        """Read the pod's metrics. If they show another run of the engine, ask what it is before they count."""
        before = pod.metrics
        metrics = await self._api.metrics(pod.url, now=self._registry.clock())
        if before is not None and is_another_run(before.boot, metrics.boot):
            self._log_restart(pod)
            await self._discover(pod)
            self._on_restarted(pod)
        self._registry.measured(pod.name, metrics)
        self._announce(pod)
        was_asleep = None if before is None else before.sleep
        if metrics.sleep is not None and was_asleep is None:
            log.warning("pod_fell_asleep", pod=pod.name, state=metrics.sleep)
        elif metrics.sleep is None and was_asleep is not None:
            log.info("pod_woke_up", pod=pod.name)
        if self._on_measured is not None:
            self._on_measured(pod, metrics)

    def _answered(self, pod: Pod) -> None:
        self._registry.answered(pod.name)
        self._stop_waiting_for(pod.name)

    def _stop_waiting_for(self, name: str) -> None:
        """`first_round` need not wait for this pod any longer, and does not miss it."""
        self._silent.discard(name)
        self._decided(name)

    def _decided(self, name: str) -> None:
        if name in self._undecided:
            self._undecided.discard(name)
            self._heard.set()

    def _delay(self, pod: Pod) -> float:
        """Seconds until the next poll: the interval, doubled per failure up to a bound, ± 10 % to spread the polls."""
        interval = self._config.scrape_interval_seconds
        back_off = min(interval * 2.0 ** min(pod.failures, 16), max(interval, MAX_BACK_OFF_SECONDS))
        return back_off * random.uniform(0.9, 1.1)  # noqa: S311 - spreads polls, no security purpose

    def _log_restart(self, pod: Pod) -> None:
        now = self._registry.clock()
        if now - self._restart_logged.get(pod.name, -RESTART_LOG_SECONDS) >= RESTART_LOG_SECONDS:
            self._restart_logged[pod.name] = now
            log.info("pod_restarted", pod=pod.name)

    def _log_health(self, pod: Pod, reason: str | None) -> None:
        if not pod.healthy:
            log.warning("pod_went_down", pod=pod.name, reason=reason)
            return
        log.info("pod_came_up", pod=pod.name, model=pod.base_model)
        if pod.served is None:
            log.warning("pod_models_withheld", pod=pod.name, note=WITHHELD)
