"""Stands between an engine's events and who follows them, and loses some."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import zmq
import zmq.asyncio

from .engine import free_ports

NOTHING = msgspec.msgpack.encode([0.0, []])
"""A batch without events."""


class Relay:
    """Passes frames on as they come; loses a `share` of them while that is above 0, or empties them while `empties`."""

    def __init__(self, port: int, seed: int) -> None:
        self.share = 0.0
        self.lost = 0
        self.empties = False
        self.emptied = 0
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._draw = random.Random(seed)

    async def run(self, source: str) -> None:
        """Pass on until cancelled."""
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
    """A relay at work."""
    made = Relay(free_ports(1)[0], seed)
    task = asyncio.create_task(made.run(source))
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.wait([task])
