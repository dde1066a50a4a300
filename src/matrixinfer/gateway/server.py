"""The gateway's servers: the API and, on an address of its own, the admin pages."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from matrixinfer.config import Config, split_address
from matrixinfer.gateway.listener import Listener, Routes


class Gateway:
    """Serves while its context is open. Leaving it drains; leaving it with an error cancels what is in flight.

    `draining` is set when the drain begins: handlers then say so, and answers end their connections.
    """

    def __init__(self, config: Config, *, api: Routes, admin: Routes, draining: asyncio.Event) -> None:
        self._drain_seconds = config.limits.drain_seconds
        self._draining = draining
        self._api = Listener(*split_address(config.listen, path="$.listen"), api, draining)
        self._admin: Listener | None = None
        if config.admin is not None:
            self._admin = Listener(*split_address(config.admin, path="$.admin"), admin, draining)
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
        """Take no more requests and let those in flight finish within `limits.drainSeconds`; then cancel them.

        Meanwhile `/ready` on the admin listener answers 503.
        """
        self._draining.set()
        await self._api.stop(self._drain_seconds)
