"""Raw frames of engines' feeds over ZMQ, for tools that look at feeds. The gateway itself follows with `subscriber`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from matrixinfer.config import KvEventsConfig
from matrixinfer.errors import MatrixInferError
from matrixinfer.kvevents.connect import Unresolved, connect, subscribe
from matrixinfer.kvevents.drain import Drain
from matrixinfer.kvevents.replay import Reply, fetch

LOOKUP_PAUSE = 2.0
"""Seconds until a name that does not resolve is looked up again."""
_NEWS_QUEUED = 1_000


class CannotListen(MatrixInferError):
    """An endpoint is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One batch, each publisher's in order and once."""

    publisher: str
    """Its endpoint."""
    seq: int
    topic: bytes | None
    """None for a replayed frame."""
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A message that is no frame."""

    publisher: str
    parts: list[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What befell a connection, in plain words."""

    publisher: str
    words: str


News: TypeAlias = Frame | Stray | Note


class Listener:
    """Listens to publishers at once. Where one has a replay endpoint, its history comes first, and gaps are filled.

    Use as an async context manager. What a slow caller does not take waits in ZMQ's queues, then is lost, which shows
    as a gap.
    """

    def __init__(self, sources: Sequence[KvEventsConfig]) -> None:
        self._sources = sources
        self.connected: set[str] = set()
        """Endpoints that a connection is up to."""
        self._news: asyncio.Queue[News | CannotListen] = asyncio.Queue(_NEWS_QUEUED)
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        # Nothing here waits: whoever is cancelled while a name is looked up is in the context already, and leaves it.
        self._context = zmq.asyncio.Context()
        self._plain_context = zmq.Context(self._context)
        self._drain = Drain()
        await self._group.__aenter__()
        self._tasks = [self._group.create_task(self._listen(source)) for source in self._sources]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        # The group must not see the caller's error: it would wrap it in an exception group.
        await self._group.__aexit__(None, None, None)
        self._context.destroy(linger=0)

    async def next(self, timeout: float) -> News | None:  # noqa: ASYNC109 - None is an answer here, not an error
        """What comes next; None when nothing does within `timeout` seconds. Raises `CannotListen`."""
        try:
            async with asyncio.timeout(timeout):
                news = await self._news.get()
        except TimeoutError:
            return None
        if isinstance(news, CannotListen):
            raise news
        return news

    async def _listen(self, source: KvEventsConfig) -> None:
        publisher = _Publisher(source, self._news.put, self._fetch)
        with ExitStack() as stack:
            try:
                socket = subscribe(self._context)
                stack.callback(socket.close, linger=0)
                monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
                stack.callback(monitor.close, linger=0)
                stack.callback(socket.disable_monitor)
                watch = self._group.create_task(self._watch(source.endpoint, monitor, publisher))
                stack.callback(watch.cancel)
                await self._connect(socket, source.endpoint)
            except zmq.ZMQError as error:
                await self._news.put(CannotListen(f"{source.endpoint}: {error}"))
            else:
                await publisher.listen(socket)

    async def _connect(self, socket: zmq.asyncio.Socket, endpoint: str) -> None:
        """Connect, once the host's name resolves."""
        noted = False
        while True:
            try:
                return await connect(socket, endpoint)
            except Unresolved as error:
                if not noted:
                    await self._news.put(Note(publisher=endpoint, words=f"{error.strerror} yet"))
                noted = True
            await asyncio.sleep(LOOKUP_PAUSE)

    async def _watch(self, endpoint: str, monitor: zmq.asyncio.Socket, publisher: _Publisher) -> None:
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            up = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if up == (endpoint in self.connected):
                continue
            (self.connected.add if up else self.connected.discard)(endpoint)
            publisher.in_doubt |= not up
            await self._news.put(Note(publisher=endpoint, words="connected" if up else "connection lost"))

    async def _fetch(self, endpoint: str, start: int) -> Reply:
        """What the engine has from number `start` on; an empty reply when it cannot be asked."""
        try:
            return await fetch(self._plain_context, self._drain, endpoint, start)
        except zmq.ZMQError:
            return Reply()


class _Publisher:
    """Puts one publisher's frames in order: its history, then live ones, gaps filled where it still has them."""

    def __init__(
        self,
        source: KvEventsConfig,
        put: Callable[[News], Awaitable[None]],
        fetch: Callable[[str, int], Awaitable[Reply]],
    ) -> None:
        self.in_doubt = False
        """The connection was lost: the engine at its other end may be another one."""
        self._name = source.endpoint
        self._replay_endpoint = source.replay_endpoint
        self._put = put
        self._fetch = fetch
        self._next: int | None = None
        self._digest = 0  # of the last frame
        self._replayed: dict[int, int] = {}  # number -> digest of frames that may come live once more

    async def listen(self, socket: zmq.asyncio.Socket) -> None:
        """Hand on everything that comes, until cancelled."""
        if self._replay_endpoint is not None:
            await self._replay(self._replay_endpoint)
        while True:
            parts = await socket.recv_multipart()
            if len(parts) == 3 and len(parts[1]) == 8:
                await self._live(int.from_bytes(parts[1], "big"), parts[0], parts[2])
            else:
                await self._put(Stray(publisher=self._name, parts=parts))

    async def _live(self, seq: int, topic: bytes, payload: bytes) -> None:
        if self._was_replayed(seq, payload):
            return
        if self._replay_endpoint is not None and (seq != self._next or self.in_doubt):
            self.in_doubt = False
            if self._next is not None and seq < self._next:
                self._next = None  # publishers count up: this is a new engine
            await self._replay(self._replay_endpoint)
            if self._was_replayed(seq, payload):
                return
        self._replayed.clear()
        await self._hand_on(seq, topic, payload)

    def _was_replayed(self, seq: int, payload: bytes) -> bool:
        return self._replayed.get(seq) == hash(payload)

    async def _replay(self, endpoint: str) -> None:
        """Hand on what the engine published after the last frame, asking anew at each hole: replies lose frames.

        The last frame itself is asked for as well: other bytes under its number are another engine's.
        """
        following = max(0, (self._next or 0) - 1)
        while True:
            asked = following
            reply = await self._fetch(endpoint, asked)
            for seq, payload in reply.frames:
                if seq > following > asked:
                    break
                if seq == (self._next or 0) - 1:
                    if hash(payload) != self._digest:
                        self._next = None
                        return await self._replay(endpoint)
                elif seq >= following:
                    self._replayed[seq] = hash(payload)
                    await self._hand_on(seq, None, payload)
                following = seq + 1
            else:
                if reply.whole:
                    return None
            if following == asked:
                await self._put(Note(publisher=self._name, words=f"no whole replay from {endpoint}"))
                return None

    async def _hand_on(self, seq: int, topic: bytes | None, payload: bytes) -> None:
        self._next, self._digest = seq + 1, hash(payload)
        await self._put(Frame(publisher=self._name, seq=seq, topic=topic, payload=payload))
