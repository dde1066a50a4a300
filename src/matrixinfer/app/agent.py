"""The agent: follows the KV events of engines beside it, and writes what they hold into Redis for all gateways."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import msgspec
import structlog

from matrixinfer.app.engines import Engines
from matrixinfer.app.fleet_setup import pod_sources
from matrixinfer.config import Config, split_address
from matrixinfer.gateway.handlers import Status
from matrixinfer.gateway.listener import Listener
from matrixinfer.index.redis.dry_run import DryRunIndex
from matrixinfer.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)


class Agent:
    """Follows every pod of a configuration. Use as an async context manager; leaving it hands its pods to the next writer.

    `listen` is the address of `/health`, `/ready` and `/metrics`, if they are wanted. With `dry_run` everything is written
    there instead, and Redis is not asked.
    """

    def __init__(self, config: Config, *, listen: str | None, dry_run: DryRunIndex | None = None) -> None:
        index = msgspec.structs.replace(config.index, kind="redis", writer="gateway", warm_start=False)
        self.config = msgspec.structs.replace(config, index=index)
        self._listen = listen
        self._dry_run = dry_run
        self._stack = AsyncExitStack()
        self.url: str | None = None
        """Base URL of `/metrics`."""

    async def __aenter__(self) -> Self:
        """Start to follow and to write. Raises `ConfigError`, and `OSError` when the address is taken."""
        metrics = Metrics()
        self.engines = engines = Engines(self.config, metrics, dry_run=self._dry_run)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engines)
            watching = await stack.enter_async_context(engines.watching())
            await stack.enter_async_context(pod_sources(self.config.discovery, watching, engines.registry, metrics))
            if self._listen is not None:
                draining = asyncio.Event()
                routes = Status(engines.registry, metrics, draining, missing=self._missing).routes()
                listener = Listener(*split_address(self._listen, path="--listen"), routes, draining)
                self.url = (await stack.enter_async_context(listener)).url
            self._stack = stack.pop_all()
        where = None if engines.setup.store is None else engines.setup.store.config.where
        pods = len(engines.registry.pods)
        log.info("agent_started", pods=pods, redis=where, listen=self.url, dry_run=self._dry_run is not None)
        return self

    def _missing(self) -> str | None:
        return None if self._dry_run is not None else self.engines.setup.missing()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)
