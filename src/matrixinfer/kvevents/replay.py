"""Asks an engine for past batches.

Engines silently drop what the receiver does not take at once, so a reply may have holes and lack its end.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import zmq

from matrixinfer.kvevents.connect import MAX_MESSAGE_BYTES, connect
from matrixinfer.kvevents.drain import Drain

MAX_BYTES = 64 * 1024 * 1024
"""A longer history takes several requests."""
FRAME_BYTES = 200
"""Memory of a frame besides its payload."""
MAX_MALFORMED = 100
FRAME_TIMEOUT, TIMEOUT = 5.0, 60.0
_END = b"\xff" * 8


@dataclass(slots=True, kw_only=True)
class Reply:
    """An engine's answer to one request, within bounds."""

    frames: list[tuple[int, bytes]] = field(default_factory=list)
    """Number and payload of each batch, in order."""
    size: int = 0
    """Memory in bytes."""
    malformed: int = 0
    asked: bool = True
    """False if this process had no means to ask."""
    whole: bool = False
    """The end marker has arrived."""

    @property
    def over(self) -> bool:
        """No further message is taken."""
        return self.whole or self.size > MAX_BYTES or self.malformed > MAX_MALFORMED

    def take(self, parts: list[bytes]) -> None:
        """Take one message: its last two parts are the number and the payload."""
        if self.over:
            return
        if len(parts) < 2 or len(parts[-2]) != 8:
            self.malformed += 1
        elif parts[-2] == _END:
            self.whole = True
        else:
            self.frames.append((int.from_bytes(parts[-2], "big"), parts[-1]))
            self.size += len(parts[-1]) + FRAME_BYTES


async def fetch(context: zmq.Context[zmq.Socket[bytes]], drain: Drain, endpoint: str, start: int) -> Reply:
    """The batches from number `start` on that arrive in time. Raises `zmq.ZMQError` for a bad endpoint."""
    reply, news = Reply(), asyncio.Event()

    def take(parts: list[bytes]) -> None:
        reply.take(parts)
        news.set()

    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RCVHWM, 0)  # the engine drops frames that this side does not take at once
        await connect(socket, endpoint)
        socket.send_multipart([b"", start.to_bytes(8, "big")], zmq.NOBLOCK)
        with drain.reading(socket, take):
            try:
                async with asyncio.timeout(TIMEOUT):
                    while not reply.over:
                        async with asyncio.timeout(FRAME_TIMEOUT):
                            await news.wait()
                        news.clear()
            except TimeoutError:
                pass  # the reply stays incomplete
    return reply
