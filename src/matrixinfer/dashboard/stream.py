"""Server-sent events: a page gets everything at first, then each second what has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from aiohttp import web

from matrixinfer.gateway.errors import error_response

PAGES = 16
"""Pages that may be open at a time."""
EVERY_SECONDS = 1.0
SLOW_SECONDS = 10.0
"""A page that has not taken what was sent to it after this time is dropped; it may connect again."""

Ask: TypeAlias = Callable[[int], Awaitable[tuple[int, bytes]]]
"""From a version to the present one and the view of what has changed since, as JSON; everything for version 0."""


class Stream:
    """Events for a bounded number of pages. Once `draining` is set, streams end."""

    def __init__(
        self, ask: Ask, draining: asyncio.Event, headers: Mapping[str, str], *, every: float = EVERY_SECONDS
    ) -> None:
        self._ask = ask
        self._draining = draining
        self._headers = headers
        self._every = every
        self.open = 0
        """Pages that are connected."""

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Send events until the page goes, is too slow, or the gateway ends."""
        if self.open >= PAGES or self._draining.is_set():
            why = "The gateway is stopping." if self._draining.is_set() else f"{PAGES} dashboards are open; close one."
            return error_response(503, why, headers={"Retry-After": "10"})
        response = web.StreamResponse(
            headers={**self._headers, "Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        self.open += 1
        try:
            async with asyncio.timeout(SLOW_SECONDS) as patience:
                await response.prepare(request)
                if request.method != "HEAD":
                    await self._send(response, patience)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            self.open -= 1
        return response

    async def _send(self, response: web.StreamResponse, patience: asyncio.Timeout) -> None:
        clock, version = asyncio.get_running_loop().time, 0
        while True:
            patience.reschedule(clock() + SLOW_SECONDS)
            version, view = await self._ask(version)
            await response.write(b"data: " + view + b"\n\n")
            patience.reschedule(None)
            if await self._is_draining():
                await response.write(b"event: stopping\ndata: {}\n\n")
                return

    async def _is_draining(self) -> bool:
        """Wait until it is time for the next event. Returns whether the gateway is stopping."""
        try:
            async with asyncio.timeout(self._every):
                await self._draining.wait()
        except TimeoutError:
            return False
        return True
