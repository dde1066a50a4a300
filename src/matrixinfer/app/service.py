"""The gateway's composition root: it creates every part, connects them, and knows nothing else."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from matrixinfer.access.gate import Gate
from matrixinfer.app.access_log import open_access_log
from matrixinfer.app.access_setup import Access
from matrixinfer.app.collectors import (
    IndexCollector,
    KeptCollector,
    LogCollector,
    MemoryCollector,
    PluginCollector,
    TokenCacheCollector,
    TokenSourceCollector,
)
from matrixinfer.app.engines import Engines
from matrixinfer.app.fleet_setup import PodSources, pod_sources
from matrixinfer.app.front_setup import Behind, build_front
from matrixinfer.app.ladder_collector import LadderCollector
from matrixinfer.app.live import Live
from matrixinfer.app.peers_collector import PeersCollector
from matrixinfer.app.reload import ReloadCollector, Reloader
from matrixinfer.app.router_setup import build_router, build_scheduler
from matrixinfer.app.served import served_models
from matrixinfer.app.systemd import Notifier
from matrixinfer.app.token_ids_setup import open_token_ids
from matrixinfer.app.tracing_setup import open_tracing
from matrixinfer.app.traffic_state import traffic_state
from matrixinfer.app.workers.worker import Worker
from matrixinfer.config import Config, PodConfig, SchedulerConfig
from matrixinfer.errors import NoPodAvailable
from matrixinfer.gateway.access_log import RequestLog
from matrixinfer.gateway.upstream import upstream
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.finder import TokenizerFinder
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.memory import Memory
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.prompt.samples import SAMPLED_CLASSES
from matrixinfer.routing.routes import Routes
from matrixinfer.routing.sizing import Sizer
from matrixinfer.scheduler.framework import Trust
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.log import LogStream
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.plugin_log import PluginLog
from matrixinfer.traffic.peers.channel import Channel, RedisChannel
from matrixinfer.traffic.peers.link import Peers
from matrixinfer.traffic.peers.local import LocalChannel
from matrixinfer.trust.cache_views import Caches

log = structlog.get_logger(__name__)


class Service:
    """A running gateway, from its configuration. Use as an async context manager; leaving it drains."""

    def __init__(
        self,
        config: Config,
        log_stream: LogStream | None = None,
        *,
        read: Callable[[], Config] | None = None,
        config_file: Path | None = None,
        notifier: Notifier | None = None,
        worker: Worker | None = None,
    ) -> None:
        """`log_stream` is where the process logs: lines that could not be written are counted in the metrics.

        `read` reads the configuration again, which `config_file` is looked at for. `notifier` reports that.
        `worker` says what this process shares with others, if it is one of several.
        """
        self.config = config
        self._log_stream = log_stream
        self._read = read
        self._config_file = config_file
        self._notifier = Notifier({}, 0) if notifier is None else notifier
        self._worker = worker
        self._channel: Channel | None = None if worker is None else LocalChannel(worker.hub)
        self._live: Live | None = None
        self._reloader: Reloader | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start every part. Raises `ConfigError`, and `OSError` when an address is taken."""
        config, clock = self.config, time.monotonic
        plugins, watch = discover(), PluginLog(clock)
        watch.skipped(plugins.broken)
        self._scheduler = build_scheduler(config.scheduler, plugins, watch)
        self.metrics = Metrics()
        self._memory = Memory(config.limits.memory_bytes)
        self.state = state = traffic_state(config, self.metrics, clock)
        self._routes = Routes(config.routes)
        self._sizer = Sizer(max_tokens=config.scheduler.max_prefix_tokens, reads_bytes=self._scheduler.reads_bytes)
        self.engines = engines = Engines(config, self.metrics, history=state.history, ladder=state.ladder, clock=clock)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engines)
            tokenizers = await self._open_tokenizers(stack, clock)
            self.router = build_router(
                config, engines, tokenizers, state, self._scheduler, self._sizer, self.metrics, clock, self._routes
            )
            self._upstream = stack.enter_context(
                upstream(config.limits, self.metrics, engines.shortages, engines.tls.at)
            )
            await self._open_peers(stack)
            self._token_ids = await open_token_ids(
                config.tokenization, engines, tokenizers, state.parity, self.metrics, clock, stack
            )
            self._register_collectors(tokenizers)
            self.watching = await stack.enter_async_context(
                engines.watching(on_gone=self.router.forget, on_models_changed=self.router.keep_models)
            )
            self.pods: PodSources = await stack.enter_async_context(
                pod_sources(config.discovery, self, engines.registry, self.metrics, state.in_flight)
            )
            await stack.enter_async_context(self._finder)
            request_log = await open_access_log(config, self.metrics, stack)
            self._traces = await open_tracing(config, self.metrics, stack)
            secret = secrets.token_bytes() if self._worker is None else self._worker.folder.secret.read_bytes()
            self.access = Access(config, self.metrics.access, engines.setup.store, secret)
            await stack.enter_async_context(self.access)
            self.front = build_front(self._behind(self.access.gate, request_log))
            self.gateway = await stack.enter_async_context(self.front.gateway)
            await self._open_reloads(stack, lambda config: build_scheduler(config, plugins, watch))
            if self._worker is not None:
                self._worker.end_with_supervisor()
            self._stack = stack.pop_all()
        pods = len(engines.registry.pods)
        if self._worker is None:
            log.info("gateway_started", listen=self.gateway.url, admin=self.gateway.admin_url, pods=pods)
        else:
            log.info("worker_started", listen=self.gateway.url, pods=pods)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        drain = self.config.drain if self._live is None else self._live.config.drain
        log.info("gateway_stopping", delay_seconds=drain.delay_seconds, timeout_seconds=drain.timeout_seconds)
        try:
            return await self._stack.__aexit__(kind, error, trace)
        finally:
            log.info("gateway_stopped")

    def delay_drain(self) -> None:
        """When this ends, go on for `drain.delaySeconds` before it takes no more requests."""
        self.gateway.delay_drain()

    def reload_soon(self) -> None:
        """Read the configuration again. No effect before the start, and where it was not read from anywhere."""
        if self._reloader is not None:
            self._reloader.reload_soon()

    def join(self, config: PodConfig) -> None:
        """Add a pod. Raises `ValueError` if there is one of that name."""
        self.watching.join(config)

    def leave(self, name: str) -> None:
        """Remove a pod, and what is kept about it; its requests may finish. Does nothing if there is no such pod."""
        pod = self.engines.registry.pod(name)
        self.watching.leave(name)
        if pod is not None:
            self._upstream.forget(pod.url)
            if self._token_ids is not None:
                self._token_ids.forget(name)

    async def _open_reloads(self, stack: AsyncExitStack, build: Callable[[SchedulerConfig], Scheduler]) -> None:
        """Read the configuration again when that is wanted, if it can be read."""
        self._live = Live(
            config=self.config,
            scheduler=self._scheduler,
            build=build,
            router=self.router,
            routes=self._routes,
            access=self.access,
            sizer=self._sizer,
            front=self.front,
            outliers=self.state.outliers,
            watching=self.watching,
            pods=self.pods,
        )
        if self._read is not None:
            reloader = Reloader(
                self.config,
                self._read,
                self._live.apply,
                file=self._config_file,
                on_begin=self._notifier.reloading,
                on_end=self._notifier.ready,
            )
            self._reloader = await stack.enter_async_context(reloader)
        self.metrics.register(ReloadCollector(self._reloader))

    async def _reload(self) -> Mapping[str, object]:
        if self._reloader is None:
            raise NoPodAvailable("The gateway is still starting.")
        return asdict(await self._reloader.reload("admin"))

    async def _open_tokenizers(self, stack: AsyncExitStack, clock: Callable[[], float]) -> TokenizerManager:
        """The tokenizers of all models, and what will look for those that nobody has named."""
        engines, config = self.engines, self.config
        self._remote = RemoteTokenizer(
            engines.session,
            cache_bytes=config.tokenization.cache_bytes,
            on_answered=self.metrics.engine_tokenized,
            clock=clock,
        )
        tokenizers = TokenizerManager(
            config.models,
            config.tokenization,
            self._remote,
            memory=self._memory,
            block_size=engines.blocks.block_size,
            on_changed=self.state.parity.unprove,
        )
        self._finder = self._find_tokenizers(tokenizers, clock)
        return await stack.enter_async_context(tokenizers)

    def _find_tokenizers(self, tokenizers: TokenizerManager, clock: Callable[[], float]) -> TokenizerFinder:
        engines, config = self.engines, self.config
        return TokenizerFinder(
            config.models,
            config.tokenization,
            tokenizers,
            RemoteTokenizer(engines.session, rests=False, clock=clock),
            fleet=partial(served_models, engines.registry),
            distrusts=lambda model: any(self.state.parity.is_approximate(model, each) for each in SAMPLED_CLASSES),
            block_size=engines.blocks.block_size,
            clock=clock,
        )

    def _tokenizer_views(self) -> Mapping[str, Mapping[str, object]]:
        """Where the token ids of each model come from, and what asking for them costs."""
        costs = {name: cost.view() for name, cost in self._remote.costs.items()}
        sends = {} if self._token_ids is None else {"sent_ids": self._token_ids.view}
        return {
            name: {**source.view(), "asking": costs.get(name), **{key: view(name) for key, view in sends.items()}}
            for name, source in self._finder.sources.items()
        }

    async def _open_peers(self, stack: AsyncExitStack) -> None:
        """Share load with other gateways and workers, if there may be any."""
        store, channel = self.engines.setup.store, self._channel
        if store is not None and store.config.share_load:
            channel = RedisChannel(store)  # where the other workers are, too
        if channel is None:
            return
        peers = Peers(
            channel,
            loads=self.state.peer_loads,
            load=self.state.load,
            history=self.state.history,
            trust_of=partial(_trust_of, self.engines.registry, self.engines.setup.caches),
            outliers=self.state.outliers,
        )
        self.metrics.register(PeersCollector(await stack.enter_async_context(peers)))

    def _register_collectors(self, tokenizers: TokenizerManager) -> None:
        kept = {
            **self.state.sizes(),
            "drift_endpoints": self.engines.drift.__len__,
            "late_prompts": lambda: tokenizers.late,
            "working_prompts": lambda: tokenizers.working,
        }
        if self._log_stream is not None:
            self.metrics.register(LogCollector(self._log_stream))
        self.metrics.register(IndexCollector(self.engines.setup.index))
        self.metrics.register(KeptCollector(kept))
        self.metrics.register(MemoryCollector(self._memory))
        self.metrics.register(TokenCacheCollector(tokenizers))
        self.metrics.register(TokenSourceCollector(lambda: self._finder.sources))
        self.metrics.register(PluginCollector(lambda: self._scheduler if self._live is None else self._live.scheduler))
        self.metrics.register(LadderCollector(self.state.ladder))

    def _behind(self, gate: Gate | None, request_log: RequestLog | None) -> Behind:
        """What the front stands before."""
        return Behind(
            config=self.config,
            engines=self.engines,
            state=self.state,
            router=self.router,
            routes=self._routes,
            upstream=self._upstream,
            memory=self._memory,
            metrics=self.metrics,
            fleet=self.pods.fleet,
            gate=gate,
            request_log=request_log,
            traces=self._traces,
            tokenizer_views=self._tokenizer_views,
            ask_again=self.watching.ask_again,
            reload=None if self._read is None else self._reload,
            worker=self._worker,
            token_ids=self._token_ids,
        )


def _trust_of(registry: PodRegistry, caches: Caches, name: str) -> Trust | None:
    """How far an endpoint's events are believed; None if there is no such endpoint."""
    if not registry.is_endpoint(name):
        return None
    cache = caches.of(name)
    return "none" if cache is None else cache.trust
