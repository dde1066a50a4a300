"""Notices that a file has other content than before."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from matrixinfer.config.files import Stamp, stamp

SETTLE_SECONDS = 0.2
"""New content counts once it is still the same after this long: the file may be half written."""


class FileWatch:
    """Looks at a file when it is asked. Reads it only if its stamp has changed, and compares the content."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._digest: bytes | None = None

    async def has_changed(self) -> bool:
        """Whether the content differs from the last time; True the first time. A file that cannot be read has not changed."""
        found = await asyncio.to_thread(stamp, self._path)
        if found is None or found == self._stamp:
            return False
        digest = await asyncio.to_thread(self._read)
        while digest is not None and digest != self._digest:
            await asyncio.sleep(SETTLE_SECONDS)
            found, again = await asyncio.to_thread(stamp, self._path), await asyncio.to_thread(self._read)
            if again == digest:
                self._stamp, self._digest = found, digest
                return True
            digest = again
        if digest is not None:
            self._stamp = found
        return False

    def _read(self) -> bytes | None:
        try:
            with self._path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return None
