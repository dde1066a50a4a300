"""The gateway's servers: the API and, on an address of its own, the admin pages."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from matrixinfer.config import Config, DrainConfig, split_address
from matrixinfer.gateway.cors import Cors
from matrixinfer.gateway.guard import guarded
from matrixinfer.gateway.listener import Listener, Routes
from matrixinfer.gateway.tls import ListenerTls


class Gateway:
    """Serves while its context is open. Leaving it drains; leaving it with an error cancels what is in flight.

    With `sockets`, that of the API and that of the admin listener, these are served instead of the configured addresses.
    `draining` is set when the drain begins: handlers then say so, and answers end their connections.
    """

    def __init__(
        self,
        config: Config,
        *,
        api: Routes,
        admin: Routes,
        draining: asyncio.Event,
        max_connections: int | None = None,
        sockets: tuple[socket.socket, socket.socket] | None = None,
    ) -> None:
        self._drain = config.drain
        self._draining = draining
        self._delay_seconds = 0.0
        self._api = Listener(
            *split_address(config.listen, path="$.listen"),
            api,
            draining,
            connections=config.connections,
            max_connections=max_connections,
            bound=None if sockets is None else sockets[0],
            cors=None if config.api.cors is None else Cors(config.api.cors),
            tls=None if config.tls is None else ListenerTls(config.tls, "$.tls"),
        )
        self._admin: Listener | None = None
        if sockets is not None:
            self._admin = Listener("worker", 0, admin, draining, connections=config.connections, bound=sockets[1])
        elif config.admin is not None:
            self._admin = Listener(
                *split_address(config.admin, path="$.admin"),
                guarded(admin, config.admin_names),
                draining,
                connections=config.connections,
                tls=None if config.admin_tls is None else ListenerTls(config.admin_tls, "$.adminTls"),
            )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Listen. Raises `OSError` when an address is taken, and `ConfigError` when a certificate cannot be read."""
        async with AsyncExitStack() as stack:
            if self._admin is not None:
                await stack.enter_async_context(self._admin)
            await stack.enter_async_context(self._api)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.drain()
        finally:
            await self._stack.aclose()

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return self._api.url

    @property
    def admin_url(self) -> str | None:
        """Base URL of the admin listener, if there is one."""
        return None if self._admin is None else self._admin.url

    async def drain(self) -> None:
        """Say that this gateway ends, then take no more requests and let those in flight finish; at last cancel them.

        From the beginning on `/ready` answers 503. After `delay_drain` requests are accepted for `drain.delaySeconds` more.
        What is not finished `drain.timeoutSeconds` after that is cancelled. Cancelling this cuts it at once.
        """
        self._draining.set()
        await asyncio.sleep(self._delay_seconds)
        await self._api.stop(self._drain.timeout_seconds)

    async def adopt(self, key: int, bound: socket.socket) -> None:
        """Serve the API on another socket as well, until `release`."""
        await self._api.adopt(key, bound)

    def release(self, key: int) -> None:
        """Accept no more connections there."""
        self._api.release(key)

    def reconfigure(self, drain: DrainConfig) -> None:
        """Drain in this way."""
        self._drain = drain

    def delay_drain(self) -> None:
        """Let the drain begin with a delay, for balancers that must see first that this gateway is not ready any more."""
        self._delay_seconds = self._drain.delay_seconds
