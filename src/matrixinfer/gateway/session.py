"""The settings of HTTP clients that talk to engines, and the one that the watcher and the remote tokenizer share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from matrixinfer.config import LimitsConfig
from matrixinfer.gateway.resolver import Resolver

IDLE_SECONDS = 4.0
"""Idle connections are closed after this long, before the engines' server (uvicorn) closes them, after 5 s."""

MAX_FIELD_BYTES = 64 * 1024
"""Longest header of an answer."""


def client_options(limits: LimitsConfig) -> dict[str, Any]:
    """Arguments of a session that adds nothing to requests, removes nothing from responses, and limits silence.

    There is no total deadline, because streams may be long; connecting and every wait for data have deadlines of their own.
    """
    return {
        "timeout": aiohttp.ClientTimeout(
            total=None, connect=limits.connect_timeout_seconds, sock_read=limits.first_byte_timeout_seconds
        ),
        "max_field_size": MAX_FIELD_BYTES,
        "auto_decompress": False,
        "cookie_jar": aiohttp.DummyCookieJar(),
        "skip_auto_headers": ("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    }


@asynccontextmanager
async def client_session(limits: LimitsConfig) -> AsyncIterator[aiohttp.ClientSession]:
    """The session of those who ask engines about themselves."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS, resolver=Resolver())
    async with aiohttp.ClientSession(connector=connector, **client_options(limits)) as session:
        yield session
