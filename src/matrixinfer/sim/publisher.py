"""Publishes KV events over ZMQ as vLLM does: live ones on a PUB socket, past ones on a ROUTER socket.

PUB frames are `[topic, seq, payload]`. `seq` has 8 bytes, big endian, and starts at 0. A DEALER that sends `["", seq]` to
the ROUTER receives `["", topic, seq, payload]` for every buffered batch from `seq` on, then the end marker
`["", "", ff×8, ""]`. Any other request gets no answer.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

BUFFER_BATCHES = 10_000
HIGH_WATER_MARK = 100_000
_END = b"\xff" * 8


class EventPublisher:
    """Publishes batches while its context is open. `serve` answers replay requests until it is cancelled.

    The ROUTER has ZMQ's default high-water mark, so that a slow reader loses frames of a long replay, as with vLLM.
    """

    def __init__(
        self,
        host: str,
        *,
        port: int = 0,
        replay_port: int = 0,
        topic: str = "",
        buffer_batches: int = BUFFER_BATCHES,
        loss: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`loss` is the share of batches, chosen by `seed`, that are not sent live. Replays include them."""
        self._host = host
        self._ports = (port, replay_port)
        self._topic = topic.encode()
        self._next = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_batches)
        self._loss = loss
        self._draw = random.Random(seed)
        self._to_lose = 0
        self._stack = ExitStack()

    async def __aenter__(self) -> Self:
        with ExitStack() as stack:
            context = zmq.Context()
            stack.callback(context.term)
            self._pub = context.socket(zmq.PUB)
            stack.callback(self._pub.close, linger=0)
            self._pub.set_hwm(HIGH_WATER_MARK)
            self._pub.bind(f"tcp://{self._host}:{self._ports[0]}")
            self._router = zmq.asyncio.Context(context).socket(zmq.ROUTER)
            stack.callback(self._router.close, linger=0)
            self._router.bind(f"tcp://{self._host}:{self._ports[1]}")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def endpoint(self) -> str:
        """Where to subscribe."""
        return self._pub.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def replay_endpoint(self) -> str:
        """Where to request past batches."""
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def published(self) -> int:
        """Batches published so far; also the sequence number of the next."""
        return self._next

    def source(self) -> dict[str, object]:
        """This publisher as an entry of vLLM's `/kv_event_sources`."""
        publish, replay = (f"tcp://*:{end.rpartition(':')[2]}" for end in (self.endpoint, self.replay_endpoint))
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": publish,
            "replay_endpoint": replay,
            "buffer_steps": self._buffer.maxlen,
            "hwm": HIGH_WATER_MARK,
            "max_queue_size": HIGH_WATER_MARK,
            "topic": self._topic.decode(),
        }

    def publish(self, payload: bytes) -> None:
        """Publish one batch. Never waits: a subscriber that is too slow loses messages."""
        if self._to_lose:
            self._to_lose -= 1
        elif self._draw.random() >= self._loss:
            self._pub.send_multipart([self._topic, self._next.to_bytes(8, "big"), payload], zmq.NOBLOCK)
        self._buffer.append((self._next, payload))
        self._next += 1

    def send_raw(self, *parts: bytes) -> None:
        """Send any message live, for example one that is not a valid frame."""
        self._pub.send_multipart(parts, zmq.NOBLOCK)

    def skip(self, batches: int) -> None:
        """Skip sequence numbers, as if these batches were lost and are no longer kept for replay."""
        self._next += batches

    def lose(self, batches: int) -> None:
        """Do not send the next `batches` live, as if the network lost them."""
        self._to_lose = batches

    def restart(self) -> None:
        """Start again as a new engine on the same endpoints: with no history, and sequence number 0."""
        self._next = 0
        self._buffer.clear()

    async def serve(self) -> None:
        """Answer replay requests, one at a time."""
        while True:
            match await self._router.recv_multipart():
                case [peer, b"", start] if len(start) == 8:
                    await self._replay(peer, int.from_bytes(start, "big"))

    async def _replay(self, peer: bytes, start: int) -> None:
        for sequence, payload in list(self._buffer):
            if sequence >= start:
                await self._router.send_multipart([peer, b"", self._topic, sequence.to_bytes(8, "big"), payload])
                # A send to a ROUTER never waits; without this a long replay would stop the engine.
                await asyncio.sleep(0)
        await self._router.send_multipart([peer, b"", b"", _END, b""])
