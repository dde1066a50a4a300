"""Where gateways publish to each other: each message goes to all that listen, also to its sender. Best effort."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol, TypeAlias

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis.store import Store

CHANNEL = "matrix:kv:gateways"

Receive: TypeAlias = Callable[[float], Awaitable[bytes | None]]
"""Waits so many seconds for a message; None if none came."""


class Channel(Protocol):
    """A channel. Its methods raise `IndexUnavailable` or `OSError` when it is lost; then they may be called again."""

    @property
    def where(self) -> str:
        """Its address, for people."""
        ...

    async def ready(self) -> None:
        """Wait until messages can be published."""
        ...

    async def publish(self, message: bytes) -> None:
        """Publish a message."""
        ...

    def listen(self) -> AbstractAsyncContextManager[Receive]:
        """Listen while the context is open."""
        ...

    def close(self) -> None:
        """Publish no more."""
        ...


class RedisChannel:
    """A channel of the shared Redis or Valkey. Listening occupies one connection of `store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # Channels span all databases of a server, but the index does not.
        self._name = CHANNEL if not store.config.db else f"{CHANNEL}:{store.config.db}"

    @property
    def where(self) -> str:
        """The server."""
        return self._store.config.where

    async def ready(self) -> None:
        """Wait until the server answers."""
        await self._store.ready()

    async def publish(self, message: bytes) -> None:
        """Publish a message."""
        client: Any = self._store.client
        await self._store.ask(client.publish(self._name, message))

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Receive]:
        """Listen while the context is open."""
        client: Any = self._store.client
        channel = client.pubsub()

        async def receive(seconds: float) -> bytes | None:
            while True:
                message = await self._store.ask(channel.get_message(timeout=seconds))
                if message is None:
                    return None
                if message["type"] == "message":  # and not that this is subscribed now
                    data: bytes = message["data"]
                    return data

        try:
            await self._store.ask(channel.subscribe(self._name))
            yield receive
        finally:
            with suppress(IndexUnavailable):
                await self._store.ask(channel.aclose())

    def close(self) -> None:
        """The connections are the store's."""
