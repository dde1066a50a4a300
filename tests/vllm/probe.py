"""Asks engines whether every event that they published has arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import zmq
import zmq.asyncio

from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.wire import BlockStored, decode

SECONDS = 30.0
SILENCE_SECONDS = 0.3
_END = b"\xff" * 8


class Probe:
    """Asks the replay sockets in `endpoints`, by name of the feed."""

    def __init__(self, endpoints: Mapping[str, str]) -> None:
        self.endpoints = endpoints

    async def settled(self, feeds: Mapping[str, PodFeed]) -> None:
        """Wait until every feed has all events of its engine. Raises `TimeoutError`."""
        with zmq.asyncio.Context() as context:
            async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
                for name, feed in feeds.items():
                    group.create_task(self._settled(context, self.endpoints[name], feed))

    async def kinds(self, name: str) -> set[str | None]:
        """The kinds of attention that a feed's engine names in the events that it still has."""
        kinds: set[str | None] = set()
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.connect(self.endpoints[name])
            await socket.send_multipart([b"", bytes(8)])
            async with asyncio.timeout(SECONDS):
                while (frames := await socket.recv_multipart())[-2] != _END:
                    kinds |= {
                        each.kv_cache_spec_kind for each in decode(frames[-1]).events if isinstance(each, BlockStored)
                    }
        return kinds

    async def _settled(self, context: zmq.asyncio.Context, endpoint: str, feed: PodFeed) -> None:
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            while not await self._is_settled(socket, feed):
                await asyncio.sleep(0.02)

    async def _is_settled(self, socket: zmq.asyncio.Socket, feed: PodFeed) -> bool:
        """Ask twice: between two answers an engine publishes queued events, so two empty answers mean that none are left."""
        if feed.position is None:
            await asyncio.sleep(SILENCE_SECONDS)  # the feed has lost its position: the next frame is a new start
            return feed.position is None
        start = feed.position
        for _ in range(2):
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            count = 0
            while (await socket.recv_multipart())[-2] != _END:
                count += 1
            if count:
                return False
        return not feed.backlog
