"""Writes the access log from a thread of its own, so that a slow disk delays no request.

    add() ─> batch, bounded ─> thread, five times a second ─> file

What does not fit into the batch, or cannot be written, is counted and left out.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import structlog

from matrixinfer.config.access_log import STANDARD_OUTPUT, AccessLogConfig
from matrixinfer.errors import ConfigError
from matrixinfer.telemetry.access_entry import AccessEntry, WrittenBlocks, text_line
from matrixinfer.telemetry.intervals import Intervals

log = structlog.get_logger(__name__)

_FLUSH_SECONDS = 0.2
_CLOSE_SECONDS = 2.0
_MOST_ENTRIES = 10_000
_MOST_BLOCKS = 1 << 20
"""Entries, and block hashes in them, that wait to be written."""
_NOTED_SECONDS = 60.0
_OUTPUT = 1


class LogFile:
    """A file that lines are appended to. It is made again when it was renamed or removed."""

    def __init__(self, path: str) -> None:
        """`-` stands for standard output."""
        self._path = path
        self._fd = -1
        self._size = 0
        self._is_torn = False

    def open(self) -> None:
        """Raises `OSError`."""
        if self._path == STANDARD_OUTPUT:
            self._fd = _OUTPUT
        else:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            self._size = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Do nothing if it is not open."""
        fd, self._fd = self._fd, -1
        if fd > _OUTPUT:
            os.close(fd)

    def renew(self) -> bool:
        """Look whether somebody else moved or cut the file; whether what is written now begins a new one.

        Raises `OSError` if it cannot be made again.
        """
        if self._path == STANDARD_OUTPUT:
            return False
        if self._fd >= 0 and self._is_in_place():
            size = os.fstat(self._fd).st_size
            was_cut, self._size = size < self._size, size
            return was_cut
        self.close()
        self.open()
        self._is_torn = False
        return True

    def write(self, data: bytes) -> None:
        """Append whole lines. Raises `OSError`; a line of which only a part was written is then ended by the next."""
        view = memoryview(b"\n" + data if self._is_torn else data)
        while view:
            written = os.write(self._fd, view)
            self._is_torn = view[written - 1] != ord("\n")
            self._size += written
            view = view[written:]

    def _is_in_place(self) -> bool:
        try:
            there = Path(self._path).stat()
        except FileNotFoundError:
            return False
        here = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


class AccessLog:
    """Use as an async context manager; leaving it writes what waits, within two seconds."""

    def __init__(self, config: AccessLogConfig) -> None:
        self.config = config
        self.written = 0
        """Lines that were written."""
        self.dropped = 0
        """Lines that could not be written, or that nothing was left for in memory."""
        self._key = secrets.token_bytes(32)
        self._threshold = int(config.sample * (1 << 64))
        self._file = LogFile(config.path)
        self._known = WrittenBlocks()
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()
        self._batch: list[AccessEntry] = []
        self._blocks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._may_log = Intervals(_NOTED_SECONDS, time.monotonic)

    async def __aenter__(self) -> Self:
        """Read the key, if one is named, and open the file. Raises `ConfigError`."""
        place = self.config.key_place()
        if place is not None:
            self._key = blake2b(place.read().reveal().encode(), digest_size=32).digest()
        try:
            self._file.open()
        except OSError as error:
            raise ConfigError("$.accessLog.path", f"cannot append to `{self.config.path}`: {error.strerror}") from error
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._file.close()

    def name_of(self, session: str) -> str:
        """The name of a session in the log."""
        return self._digest(session).hex()

    def takes(self, name: str) -> bool:
        """Whether the requests of a session, or the request, of this name are in the sample."""
        return self.config.sample >= 1 or int.from_bytes(self._digest(name)) < self._threshold

    def add(self, entry: AccessEntry) -> None:
        """Write an entry soon. It must not change any more."""
        blocks = len(entry.blocks)
        with self._lock:
            if len(self._batch) >= _MOST_ENTRIES or self._blocks + blocks > _MOST_BLOCKS:
                self.dropped += 1
                return
            self._batch.append(entry)
            self._blocks += blocks

    def _digest(self, name: str) -> bytes:
        return blake2b(name.encode(errors="replace"), digest_size=8, key=self._key).digest()

    def _run(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._stop.wait(_FLUSH_SECONDS)
            with self._lock:
                batch, self._batch, self._blocks = self._batch, [], 0
            if batch:
                self._write(batch)

    def _write(self, batch: list[AccessEntry]) -> None:
        try:
            if self._file.renew():
                self._known.forget()
            self._file.write(b"".join(map(self._line, batch)))
            self.written += len(batch)
        except OSError as error:
            self._lost(batch, error.strerror)
        except Exception as error:  # noqa: BLE001  # Supervision boundary: nothing else would start the thread again.
            self._lost(batch, type(error).__name__)

    def _lost(self, batch: Sequence[AccessEntry], reason: str | None) -> None:
        self.dropped += len(batch)
        self._known.forget()
        if self._may_log("failed"):
            log.warning("access_log_write_failed", path=self.config.path, error=reason, dropped=self.dropped)

    def _line(self, entry: AccessEntry) -> bytes:
        if self.config.format == "text":
            return text_line(entry).encode() + b"\n"
        self._known.shorten(entry)
        return self._encoder.encode(entry) + b"\n"
