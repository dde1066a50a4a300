"""Engines, as a follower sees them: a process with sockets that publish recorded frames on command."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import zmq

from matrixinfer.sim.publisher import EventPublisher

_END_SECONDS = 10
_SUBSCRIBE_SECONDS = 60


@contextmanager
def in_process(target: Callable[..., None], *args: object) -> Iterator[Connection]:
    """Run `target(connection, *args)` in a new process. It must end when the connection is closed."""
    context: Any = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(_END_SECONDS)
        process.kill()


def publish_live(commands: Connection, feeds: Sequence[Sequence[bytes]]) -> None:
    """Publish `feeds`, one socket each. Sends the endpoints, then None when all have a subscriber.

    A command is a pair: the frame number at which each feed pauses, and frames per second, or None for full speed.
    """
    with ExitStack() as stack:
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        sockets = []
        for _ in feeds:
            socket = context.socket(zmq.XPUB)  # a PUB that reports its subscribers
            socket.set_hwm(0)
            socket.setsockopt(zmq.RCVTIMEO, _SUBSCRIBE_SECONDS * 1_000)
            socket.bind("tcp://127.0.0.1:*")
            sockets.append(socket)
        commands.send([socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in sockets])
        for socket in sockets:
            socket.recv()
        commands.send(None)
        first = 0
        for end, rate in _received(commands):
            frames = (
                (socket, seq, feed[seq])
                for seq in range(first, end)
                for socket, feed in zip(sockets, feeds, strict=True)
                if seq < len(feed)
            )
            _publish(frames, None if rate is None else rate * len(feeds))
            first = end


def _received(commands: Connection) -> Iterator[Any]:
    with suppress(EOFError):
        while True:
            yield commands.recv()


def _publish(frames: Iterable[tuple[zmq.Socket[bytes], int, bytes]], rate: float | None) -> None:
    """Publish at `rate` frames per second in total."""
    start = time.perf_counter()
    for sent, (socket, seq, payload) in enumerate(frames):
        if rate is not None:
            time.sleep(max(0.0, start + sent / rate - time.perf_counter()))
        socket.send_multipart([b"", seq.to_bytes(8, "big"), payload])


def publish_history(commands: Connection, payloads: Sequence[bytes]) -> None:
    """An engine that published `payloads` before anyone subscribed, and replays them. Sends its two endpoints."""
    asyncio.run(_replay(commands, payloads))


async def _replay(commands: Connection, payloads: Sequence[bytes]) -> None:
    async with EventPublisher("127.0.0.1") as publisher, asyncio.TaskGroup() as group:
        for payload in payloads:
            publisher.publish(payload)
        commands.send((publisher.endpoint, publisher.replay_endpoint))
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(commands.fileno(), ended.set)
        serving = group.create_task(publisher.serve())
        await ended.wait()
        serving.cancel()
