"""The HTTP client shared by the proxy, the watcher and the remote tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from matrixinfer.config import LimitsConfig

IDLE_SECONDS = 4.0
"""Idle connections are closed after this long, before the engines' server (uvicorn) closes them, after 5 s."""


@asynccontextmanager
async def client_session(limits: LimitsConfig) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that adds nothing to requests, removes nothing from responses, and limits silence instead of length.

    The number of connections is not limited: the scheduler limits what is in flight. There is no total deadline, because
    streams may be long; connecting and every wait for data have deadlines of their own.
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
