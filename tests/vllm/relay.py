"""A relay between an engine's events and their follower, which can lose or empty frames."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import zmq
import zmq.asyncio

from tests.ports import free_port

NOTHING = msgspec.msgpack.encode([0.0, []])
"""A batch without events."""


class Relay:
    """Forwards frames. Loses a `share` of them while that is above 0, or removes their events while `empties` is set."""

    def __init__(self, port: int, seed: int) -> None:
        self.share = 0.0
        self.lost = 0
        self.empties = False
        self.emptied = 0
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._draw = random.Random(seed)

    async def run(self, source: str) -> None:
        """Forward frames until cancelled."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as inner, context.socket(zmq.PUB) as outer:
            inner.subscribe(b"")
            inner.connect(source)
            outer.bind(self.endpoint)
            while True:
                frame = await inner.recv_multipart()
                if self.empties:
                    self.emptied += 1
                    await outer.send_multipart([*frame[:2], NOTHING])
                elif self._draw.random() < self.share:
                    self.lost += 1
                else:
                    await outer.send_multipart(frame)


@asynccontextmanager
async def relay(source: str, *, seed: int) -> AsyncIterator[Relay]:
    """A running relay."""
    running = Relay(free_port(), seed)
    task = asyncio.create_task(running.run(source))
    try:
        yield running
    finally:
        task.cancel()
        await asyncio.wait([task])
