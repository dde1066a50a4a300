"""Raw frames of engines' feeds over ZMQ, for tools. The gateway itself uses `matrixinfer.kvevents.subscriber`."""

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
from matrixinfer.kvevents.cursor import Cursor, Source, Verdict
from matrixinfer.kvevents.drain import Drain
from matrixinfer.kvevents.replay import Reply, fetch

LOOKUP_PAUSE = 2.0
"""Seconds until a host name that does not resolve is looked up again."""
_NEWS_QUEUED = 1_000


class CannotListen(MatrixInferError):
    """An endpoint is not a valid ZMQ address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One batch. The frames of each publisher come in order and once."""

    publisher: str
    """Its endpoint."""
    seq: int
    topic: bytes | None
    """None for a replayed frame, as replays do not carry it."""
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A message that is not a frame."""

    publisher: str
    parts: list[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A change of a connection's state, in words."""

    publisher: str
    words: str
    is_unresolved: bool = False
    """The name of the publisher's host does not resolve."""


News: TypeAlias = Frame | Stray | Note


class Listener:
    """Listens to several publishers. If one has a replay endpoint, its history comes first and its gaps are filled.

    Use it as an async context manager. What a slow caller does not take waits in ZMQ's queues; when those are full,
    frames are lost, which shows as a gap.
    """

    def __init__(self, sources: Sequence[KvEventsConfig]) -> None:
        self._sources = sources
        self.connected: set[str] = set()
        """The endpoints whose connection is up."""
        self._news: asyncio.Queue[News | CannotListen] = asyncio.Queue(_NEWS_QUEUED)
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def __aenter__(self) -> Self:
        # Nothing here waits: a caller cancelled while a name is looked up has already entered the context, and leaves it.
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
        self._closed = self._context.closed

    @property
    def closed(self) -> bool:
        """Whether every socket is closed; False before the context is entered."""
        return self._closed

    async def next(self, timeout: float) -> News | None:  # noqa: ASYNC109 - None is an answer here, not an error
        """What comes next; None if nothing comes within `timeout` seconds. Raises `CannotListen`."""
        try:
            async with asyncio.timeout(timeout):
                news = await self._news.get()
        except TimeoutError:
            return None
        if isinstance(news, CannotListen):
            raise news
        return news

    async def _listen(self, source: KvEventsConfig) -> None:
        sequence = FrameSequence(source, self._news.put, self._fetch)
        with ExitStack() as stack:
            try:
                socket = subscribe(self._context)
                stack.callback(socket.close, linger=0)
                monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
                stack.callback(monitor.close, linger=0)
                stack.callback(socket.disable_monitor)
                watch = self._group.create_task(self._watch(source.endpoint, monitor, sequence))
                stack.callback(watch.cancel)
                await self._connect(socket, source.endpoint)
            except zmq.ZMQError as error:
                await self._news.put(CannotListen(f"{source.endpoint}: {error}"))
            else:
                await sequence.history()
                await self._receive(socket, source.endpoint, sequence)

    async def _receive(self, socket: zmq.asyncio.Socket, endpoint: str, sequence: FrameSequence) -> None:
        while True:
            parts = await socket.recv_multipart()
            if len(parts) == 3 and len(parts[1]) == 8:
                await sequence.live(int.from_bytes(parts[1], "big"), parts[0], parts[2])
            else:
                await self._news.put(Stray(publisher=endpoint, parts=parts))

    async def _connect(self, socket: zmq.asyncio.Socket, endpoint: str) -> None:
        """Connect as soon as the host's name resolves."""
        noted = False
        while True:
            try:
                return await connect(socket, endpoint)
            except Unresolved as error:
                if not noted:
                    words = f"{error.strerror} yet"
                    await self._news.put(Note(publisher=endpoint, words=words, is_unresolved=True))
                noted = True
            await asyncio.sleep(LOOKUP_PAUSE)

    async def _watch(self, endpoint: str, monitor: zmq.asyncio.Socket, sequence: FrameSequence) -> None:
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            up = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if up == (endpoint in self.connected):
                continue
            (self.connected.add if up else self.connected.discard)(endpoint)
            sequence.in_doubt |= not up
            await self._news.put(Note(publisher=endpoint, words="connected" if up else "connection lost"))

    async def _fetch(self, endpoint: str, start: int) -> Reply:
        """What the engine has from number `start` on; an empty reply if it cannot be asked."""
        try:
            return await fetch(self._plain_context, self._drain, endpoint, start)
        except zmq.ZMQError:
            return Reply()


class FrameSequence:
    """Puts one publisher's frames in order: its history first, then live frames, with gaps filled by replays.

    `put` takes what comes next; `fetch` asks the engine for a replay. Without a replay endpoint live frames are passed on
    as they come.
    """

    def __init__(
        self,
        source: KvEventsConfig,
        put: Callable[[News], Awaitable[None]],
        fetch: Callable[[str, int], Awaitable[Reply]],
    ) -> None:
        self.in_doubt = False
        """The connection was lost: there may be another engine at its other end."""
        self._name = source.endpoint
        self._replay_endpoint = source.replay_endpoint
        self._put = put
        self._fetch = fetch
        self._cursor = Cursor()

    async def live(self, seq: int, topic: bytes, payload: bytes) -> None:
        """Pass on a live frame, after whatever is missing before it."""
        if self._replay_endpoint is None:
            await self._pass_on(seq, topic, payload)
            return
        means = Verdict.GAP if self._must_prove(seq) else self._cursor.advance(Source.LIVE, seq, hash(payload))
        if means in (Verdict.GAP, Verdict.RESTART):
            self.in_doubt = False
            if means is Verdict.RESTART:
                self._cursor.restart()
            await self.history()
            means = self._cursor.advance(Source.LIVE, seq, hash(payload))
            if means in (Verdict.GAP, Verdict.RESTART):  # the engine does not have what is missing
                self._cursor.lose()
                means = self._cursor.advance(Source.LIVE, seq, hash(payload))
        if means is Verdict.APPLY:
            await self._pass_on(seq, topic, payload)

    async def history(self) -> None:
        """Pass on what the engine published after the last frame. Replies lose frames: each hole is asked for again.

        The last frame itself is asked for as well: other bytes under its number are another engine's.
        """
        if self._replay_endpoint is None:
            return
        self._cursor.doubt()
        while True:
            start = self._replay_from
            reply = await self._fetch(self._replay_endpoint, start)
            stopped_by = await self._take(reply)
            if stopped_by is None and reply.whole:
                return
            if stopped_by is not Verdict.RESTART and self._replay_from == start:
                await self._put(Note(publisher=self._name, words=f"no whole replay from {self._replay_endpoint}"))
                return

    @property
    def _replay_from(self) -> int:
        """The next number, or the last one while the engine has yet to show that it published that."""
        return (self._cursor.next or 0) if self._cursor.proven else self._cursor.replay_from

    def _must_prove(self, seq: int) -> bool:
        """Whether the next frame may be another engine's."""
        return self.in_doubt and seq == self._cursor.next

    async def _take(self, reply: Reply) -> Verdict | None:
        """Pass on a reply's frames up to a hole, or to the frame that shows another engine; returns which it was.

        What is missing before the first frame is not a hole: the engine no longer has it.
        """
        for position, (seq, payload) in enumerate(reply.frames):
            means = self._cursor.advance(Source.REPLAY, seq, hash(payload))
            if means is Verdict.RESTART:
                self._cursor.restart()
                return means
            if means in (Verdict.GAP, Verdict.TRUNCATED):
                if position:
                    return means
                self._cursor.lose()
                means = self._cursor.advance(Source.REPLAY, seq, hash(payload))
            if means is Verdict.APPLY:
                await self._pass_on(seq, None, payload)
        return None

    async def _pass_on(self, seq: int, topic: bytes | None, payload: bytes) -> None:
        await self._put(Frame(publisher=self._name, seq=seq, topic=topic, payload=payload))
