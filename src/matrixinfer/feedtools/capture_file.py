"""Captures on disk: JSON lines, gzipped if the file's name ends in `.gz`."""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matrixinfer.errors import MatrixInferError


class CaptureFileError(MatrixInferError):
    """The file cannot be read or written, or holds something other than JSON objects."""


class CaptureReader:
    """The rows of a capture. Each iteration reads the file again, and raises `CaptureFileError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cut = False
        """The file ends in the middle of a row or of its compressed data, as after a recording that was killed."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.cut = False
        try:
            with _open_for_reading(self._path) as lines:
                for number, line in enumerate(lines, 1):
                    row = self._row(line, number)
                    if row is not None:
                        yield row
        except EOFError:
            self.cut = True
        except (OSError, zlib.error) as error:
            raise CaptureFileError(_reason(error)) from error

    def _row(self, line: bytes, number: int) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n"):
                self.cut = True
                return None
            raise CaptureFileError(f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise CaptureFileError(f"line {number}: expected a JSON object")
        return row


class CaptureWriter:
    """Writes a capture and overwrites the file. Use it as a context manager; every method raises `CaptureFileError`.

    Captures hold token ids, so the file becomes readable by its owner only. What was written before the last `flush`
    stays readable if the process is killed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._file: BufferedWriter | gzip.GzipFile
        self.size = 0
        """Bytes written, before compression."""

    def __enter__(self) -> Self:
        try:
            plain = self._file = self._stack.enter_context(open(self._path, "wb", opener=_owner_only))
        except OSError as error:
            raise CaptureFileError(_reason(error)) from error
        if self._path.suffix == ".gz":
            self._file = self._stack.enter_context(gzip.GzipFile(fileobj=plain, mode="wb"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        except OSError as fault:
            raise CaptureFileError(_reason(fault)) from fault

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise CaptureFileError(_reason(error)) from error
        self.size += len(line)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        try:
            self._file.flush()
        except OSError as error:
            raise CaptureFileError(_reason(error)) from error


def _open_for_reading(path: Path) -> BufferedReader | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _owner_only(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # leave devices such as /dev/null as they are
            os.fchmod(descriptor, 0o600)  # the file may have existed and been open to others
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
