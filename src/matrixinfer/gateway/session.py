"""The HTTP client that proxy, watcher and remote tokenizer share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from matrixinfer.config import LimitsConfig

IDLE_SECONDS = 4.0
"""Idle connections are dropped after this long: before the engines' servers (uvicorn) drop them, which they do after 5 s."""


@asynccontextmanager
async def client_session(limits: LimitsConfig) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that adds nothing to requests, takes nothing from responses, and bounds silence instead of length.

    Connections are not limited: what is in flight is the scheduler's affair. There is no total deadline, as a stream
    may be long; connecting and every wait for data have theirs.
    """
    timeout = aiohttp.ClientTimeout(
        total=None, connect=limits.connect_timeout_seconds, sock_read=limits.request_timeout_seconds
    )
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
        timeout=timeout,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    ) as session:
        yield session
