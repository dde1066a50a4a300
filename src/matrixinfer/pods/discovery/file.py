"""Pods from a file that somebody else keeps up to date."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from matrixinfer.config import FileSource, parse_pods
from matrixinfer.errors import ConfigError
from matrixinfer.pods.discovery.source import Fail, Publish

MAX_BYTES: Final = 8 * 1024 * 1024
SETTLE_SECONDS: Final = 0.2
"""New content counts once it is still the same after this long: a file that is written in place may be half written."""


class FilePods:
    """Reads the file again and again. What it says counts when it is complete and valid, or else the last good list does.

    The content is compared, not the time of the last change, which file systems round and which a rename may set back.
    """

    def __init__(self, config: FileSource) -> None:
        self._path = Path(config.path)
        self._interval = config.interval_seconds

    async def watch(self, publish: Publish, fail: Fail) -> None:
        """Publish the list at once, and whenever the content of the file is new."""
        known: bytes | None = None
        while True:
            try:
                content = await asyncio.to_thread(self._read)  # a file system that hangs only keeps the last list
                if content != known:
                    known = content = await self._settled(content)
                    publish(parse_pods(content.decode(), base=self._path.parent))
            except OSError as error:
                known = None
                fail(f"cannot read {self._path}: {error.strerror or error}")
            except (UnicodeDecodeError, ConfigError) as error:
                fail(f"{self._path}: {error}")
            await asyncio.sleep(self._interval)

    async def _settled(self, content: bytes) -> bytes:
        """The content once it stays the same."""
        while True:
            await asyncio.sleep(SETTLE_SECONDS)
            again = await asyncio.to_thread(self._read)
            if again == content:
                return content
            content = again

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise OSError(f"expected at most {MAX_BYTES} bytes")
        return content
