"""Resolves the names of pods. A name server that fails does not take away pods whose addresses are known."""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

PATIENCE_SECONDS = 1.0
"""How long an answer is waited for where an older one is known."""
_MOST_NAMES = 4096
_GONE = frozenset((socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)))
"""What a name server answers about names that no longer exist."""


class Resolver(AbstractResolver):
    """Asks `inner`, and falls back on its last answer when it fails or takes long."""

    def __init__(self, inner: AbstractResolver | None = None) -> None:
        self._inner = inner or ThreadedResolver()
        self._known: OrderedDict[tuple[str, int, socket.AddressFamily], list[ResolveResult]] = OrderedDict()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of a host. Raises `OSError` when it has none, or when none is known."""
        key = host, port, family
        known = self._known.get(key)
        try:
            async with asyncio.timeout(None if known is None else PATIENCE_SECONDS):
                found = await self._inner.resolve(host, port, family)
        except OSError as error:  # a `TimeoutError` is one
            if isinstance(error, socket.gaierror) and error.errno in _GONE:
                self._known.pop(key, None)
                raise
            if known is None:
                raise
            return known
        self._known[key] = found
        self._known.move_to_end(key)
        if len(self._known) > _MOST_NAMES:
            self._known.popitem(last=False)
        return found

    async def close(self) -> None:
        """Close `inner`."""
        await self._inner.close()
