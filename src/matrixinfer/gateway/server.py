"""The gateway's servers: the API and, on an address of its own, what operators ask."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

import aiohttp

from matrixinfer.config import Config, split_address
from matrixinfer.gateway.handlers import Admin, Api, Status
from matrixinfer.gateway.listener import Listener
from matrixinfer.gateway.proxy import Proxy
from matrixinfer.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from matrixinfer.routing.router import Router


class Gateway:
    """Serves while its context is open. Leaving it drains; leaving it with an error cancels what is in flight."""

    def __init__(self, config: Config, router: Router, metrics: Metrics, session: aiohttp.ClientSession) -> None:
        self._drain_seconds = config.limits.drain_seconds
        self._draining = asyncio.Event()
        status = Status(router.registry, metrics, self._draining)
        proxy = Proxy(session, metrics, config.limits, self._draining)
        api = Api(router, proxy, metrics, config.limits)
        self._api = Listener(
            *split_address(config.listen, path="$.listen"), {**api.routes(), **status.routes()}, self._draining
        )
        self._admin: Listener | None = None
        if config.admin is not None:
            admin = Admin(router, config.limits)
            self._admin = Listener(
                *split_address(config.admin, path="$.admin"), {**admin.routes(), **status.routes()}, self._draining
            )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Listen. Raises `OSError` when an address is taken."""
        async with AsyncExitStack() as stack:
            if self._admin is not None:
                await stack.enter_async_context(self._admin)
            await stack.enter_async_context(self._api)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.drain()
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
        """Take no more requests and let those in flight finish, within `limits.drainSeconds`; then cancel them.

        Meanwhile `/ready` on the admin listener answers 503.
        """
        self._draining.set()
        await self._api.stop(self._drain_seconds)
