"""Receives from many ZMQ sockets on the event loop without blocking it, whatever the number and the size of messages."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq

SLICE_SECONDS = 0.002

_Socket = zmq.Socket[bytes]
_OnMessage = Callable[[list[bytes]], Iterator[None] | None]
"""Takes the parts of a message. What it leaves to do is done step by step, before the next message of that socket."""


class Drain:
    """Takes one message from each readable socket in turn, for at most `SLICE_SECONDS` per turn of the event loop.

    ZMQ's descriptors signal edges: after a signal a socket is read until it is empty, in this turn or later ones.
    """

    def __init__(self) -> None:
        self._readable: OrderedDict[_Socket, _OnMessage] = OrderedDict()
        self._rests: dict[_Socket, Iterator[None]] = {}
        """What is left to do of the last message of a socket."""
        self._next: asyncio.Handle | None = None

    @contextmanager
    def reading(self, socket: _Socket, on_message: _OnMessage) -> Iterator[None]:
        """Within the context, call `on_message` with the parts of every message that arrives."""
        descriptor = int(socket.getsockopt(zmq.FD))
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, self._queue, socket, on_message)
        self._queue(socket, on_message)
        try:
            yield
        finally:
            loop.remove_reader(descriptor)
            self._readable.pop(socket, None)
            self._rests.pop(socket, None)

    def _queue(self, socket: _Socket, on_message: _OnMessage) -> None:
        self._readable.setdefault(socket, on_message)
        self._go_on()

    def _go_on(self) -> None:
        if self._readable and self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._next = None
        deadline = time.monotonic() + SLICE_SECONDS
        try:
            while self._readable:
                socket, on_message = self._readable.popitem(last=False)
                rest = self._rests.pop(socket, None)
                if rest is None:
                    try:
                        parts = socket.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        continue
                    self._readable[socket] = on_message
                    rest = on_message(parts)
                else:
                    self._readable[socket] = on_message
                if rest is not None and not _is_done(rest, deadline):
                    self._rests[socket] = rest
                if time.monotonic() >= deadline:
                    break
        finally:
            self._go_on()  # even after an error: there may be no further signal for the messages left


def _is_done(rest: Iterator[None], deadline: float) -> bool:
    """Go on with what is left to do until the deadline, by one step at least. Returns whether nothing is left."""
    return all(time.monotonic() < deadline for _ in rest)
