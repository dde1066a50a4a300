"""Asks engines whether all that they have published has come."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import zmq
import zmq.asyncio

from matrixinfer.kvevents.feed import PodFeed

SECONDS = 30.0
SILENCE_SECONDS = 0.3
_END = b"\xff" * 8


class Probe:
    """Questions to the replay sockets in `endpoints`, by the name of the feed."""

    def __init__(self, endpoints: Mapping[str, str]) -> None:
        self._endpoints = endpoints

    async def settled(self, feeds: Mapping[str, PodFeed]) -> None:
        """Wait until every feed has all that its engine has to tell. Raises `TimeoutError`."""
        with zmq.asyncio.Context() as context:
            async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
                for name, feed in feeds.items():
                    group.create_task(self._settled(context, self._endpoints[name], feed))

    async def _settled(self, context: zmq.asyncio.Context, endpoint: str, feed: PodFeed) -> None:
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            while not await self._is_settled(socket, feed):
                await asyncio.sleep(0.02)

    async def _is_settled(self, socket: zmq.asyncio.Socket, feed: PodFeed) -> bool:
        """Between two answers an engine publishes what was waiting: if the second brings nothing, nothing was."""
        if feed.position is None:
            await asyncio.sleep(SILENCE_SECONDS)  # it has lost its place: whatever comes next is a beginning
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
