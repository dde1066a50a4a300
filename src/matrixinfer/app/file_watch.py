"""Notices that a file has other content than before."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

SETTLE_SECONDS = 0.2
"""New content counts once it is still the same after this long: the file may be half written."""


class FileWatch:
    """Looks at a file when it is asked. Reads it only if its state has changed, and compares what is in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: tuple[int, ...] | None = None
        self._digest: bytes | None = None

    async def has_changed(self) -> bool:
        """Whether the content differs from the last time; True the first time. A file that cannot be read has not changed."""
        state = await asyncio.to_thread(self._look)
        if state is None or state == self._state:
            return False
        digest = await asyncio.to_thread(self._read)
        while digest is not None and digest != self._digest:
            await asyncio.sleep(SETTLE_SECONDS)
            state, again = await asyncio.to_thread(self._look), await asyncio.to_thread(self._read)
            if again == digest:
                self._state, self._digest = state, digest
                return True
            digest = again
        if digest is not None:
            self._state = state
        return False

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> bytes | None:
        try:
            with self._path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return None
