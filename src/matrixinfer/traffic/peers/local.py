"""A channel between the processes of one machine: a hub on a Unix socket passes on what each of them publishes."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from matrixinfer.traffic.peers.channel import Receive
from matrixinfer.traffic.peers.message import MAX_BYTES

_LENGTH: Final = struct.Struct("!I")
_LISTEN, _PUBLISH = b"L", b"P"
_MAX_WAITING: Final = 8 * MAX_BYTES
"""Bytes that wait for one listener; while there are more, it misses messages."""
CONNECT_SECONDS: Final = 2.0
_END_SECONDS: Final = 1.0


class Hub:
    """Listens at `path` while its context is open. A first byte says what a connection is for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listeners: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        if self._server is not None:
            self._server.close()
        for each in tuple(self._connections):
            each.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_closed or (task := asyncio.current_task()) is None:
            writer.close()
            return
        self._tasks.add(task)
        self._connections.add(writer)
        try:
            if await reader.readexactly(1) == _LISTEN:
                self._listeners.add(writer)
                writer.write(_LISTEN)
                await reader.read(1)  # until it goes
            else:
                while True:
                    self._pass_on(await _read(reader))
        except (OSError, EOFError):
            pass  # the process has gone
        finally:
            self._listeners.discard(writer)
            self._connections.discard(writer)
            self._tasks.discard(task)
            writer.close()

    def _pass_on(self, message: bytes) -> None:
        for each in self._listeners:
            if not each.is_closing() and each.transport.get_write_buffer_size() < _MAX_WAITING:
                each.write(_LENGTH.pack(len(message)) + message)


class LocalChannel:
    """The hub at `path`, as its clients see it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._lock = asyncio.Lock()

    @property
    def where(self) -> str:
        """The socket of the hub."""
        return str(self._path)

    async def ready(self) -> None:
        """Connect, if that is not done."""
        await self._open()

    async def _open(self) -> asyncio.StreamWriter:
        async with self._lock:  # whoever publishes and whoever listens come at the same time
            if self._writer is None or self._writer.is_closing():
                _, self._writer = await self._connect(_PUBLISH)
            return self._writer

    async def publish(self, message: bytes) -> None:
        """Publish a message. Raises `OSError` when the hub has gone."""
        writer = await self._open()
        try:
            writer.write(_LENGTH.pack(len(message)) + message)
            await writer.drain()
        except OSError:
            writer.close()
            raise

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Receive]:
        """Listen while the context is open."""
        reader, writer = await self._connect(_LISTEN)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await reader.readexactly(1)  # from now on, no message is missed
        except BaseException as error:
            writer.close()
            if isinstance(error, EOFError):
                raise ConnectionResetError("the hub has gone") from error
            raise
        coming: asyncio.Task[bytes] | None = None

        async def receive(seconds: float) -> bytes | None:
            nonlocal coming
            coming = coming or asyncio.create_task(
                _read(reader)
            )  # goes on if `seconds` pass in the middle of a message
            done, _ = await asyncio.wait([coming], timeout=seconds)
            if not done:
                return None
            task, coming = coming, None
            try:
                return task.result()
            except EOFError as error:
                raise ConnectionResetError("the hub has gone") from error

        try:
            yield receive
        finally:
            writer.close()
            if coming is not None:
                coming.cancel()
                with suppress(asyncio.CancelledError, OSError, EOFError):
                    await coming

    async def _connect(self, purpose: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(self._path)
        writer.write(purpose)
        return reader, writer

    def close(self) -> None:
        """Publish no more."""
        if self._writer is not None:
            self._writer.close()


async def _read(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_BYTES:
        raise ConnectionAbortedError(f"a message of {length} bytes")
    return await reader.readexactly(length)
