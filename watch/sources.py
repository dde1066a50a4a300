"""The Python files of a release, read from its wheel or its source distribution."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

MAX_FILE_BYTES = 8 * 1024 * 1024
"""A larger file is not one of those that are read here."""


class CannotRead(Exception):
    """What a release was expected to have is not there, or cannot be read. The message says what to do."""


class Sources(Protocol):
    """The files of one release, by their path within the package, such as `vllm/distributed/kv_events.py`."""

    def text(self, path: str) -> str | None:
        """The text of a file; None if there is no such file."""
        ...


@contextmanager
def opened(archive: Path) -> Iterator[Sources]:
    """The sources in a wheel or a source distribution. Raises `CannotRead`."""
    try:
        if archive.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(archive) as wheel:
                yield _Wheel(wheel)
        else:
            yield _Unpacked(archive)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise CannotRead(
            f"{archive.name} cannot be read: {error}. Delete {archive}, so that the next run downloads it again"
        ) from error


class _Wheel:
    def __init__(self, wheel: zipfile.ZipFile) -> None:
        self._wheel = wheel

    def text(self, path: str) -> str | None:
        try:
            member = self._wheel.getinfo(path)
        except KeyError:
            return None
        return _decoded(path, self._wheel.read(member) if member.file_size <= MAX_FILE_BYTES else None)


class _Unpacked:
    """A compressed archive has no directory, so one pass takes every Python file."""

    def __init__(self, archive: Path) -> None:
        self._files: dict[str, bytes] = {}
        with tarfile.open(archive, "r:gz") as distribution:
            for member in distribution:
                if member.isfile() and member.name.endswith(".py") and member.size <= MAX_FILE_BYTES:
                    content = distribution.extractfile(member)
                    if content is not None:
                        self._files["/".join(PurePosixPath(member.name).parts[1:])] = content.read()

    def text(self, path: str) -> str | None:
        return _decoded(path, self._files[path]) if path in self._files else None


def _decoded(path: str, content: bytes | None) -> str:
    if content is None:
        raise CannotRead(f"{path} has more than {MAX_FILE_BYTES:,} bytes. Look for what is read there in another file")
    return content.decode("utf-8", "replace")
