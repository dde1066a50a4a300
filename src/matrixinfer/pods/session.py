"""The HTTP session of those who ask engines about themselves: the watcher, the remote tokenizer and the doctor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
from yarl import URL

from matrixinfer.config.secrets import Secret
from matrixinfer.pods.engine_tls import Trust
from matrixinfer.pods.resolver import Resolver

IDLE_SECONDS = 4.0
"""Idle connections are closed after this long, before the engines' server (uvicorn) closes them, after 5 s."""

MAX_FIELD_BYTES = 64 * 1024
"""Longest header of an answer."""


@asynccontextmanager
async def client_session(
    key_for: Callable[[URL], Secret | None] = lambda _: None,
    trust_for: Callable[[URL], Trust | None] = lambda _: None,
) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that adds only the engine's key to requests, and removes nothing from responses.

    Each request has its own deadline. `key_for` says which key the engine at a URL requires, `trust_for` how to reach it
    by TLS.
    """

    async def authorized(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        key = key_for(request.url)
        if key is not None:
            request.headers["Authorization"] = f"Bearer {key.reveal()}"
        trust = trust_for(request.url)
        if trust is not None:
            request._ssl = trust.context  # noqa: SLF001 - there is no other way for one session to reach each by its own
            request.server_hostname = trust.server_name
        return await send(request)

    async with aiohttp.ClientSession(
        middlewares=(authorized,),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS, resolver=Resolver()),
        max_field_size=MAX_FIELD_BYTES,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    ) as session:
        yield session
