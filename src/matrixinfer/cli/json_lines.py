"""JSON lines in, JSON lines out. Each answer is flushed at once, so that a command can run as a coprocess."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec

from matrixinfer.errors import ConfigError


def read(file: Path | None) -> Iterator[bytes]:
    """The lines of `file`, or of standard input, as they arrive, without blank ones. Raises `ConfigError`."""
    with ExitStack() as stack:
        try:
            source = sys.stdin.buffer if file is None else stack.enter_context(file.open("rb"))
        except OSError as error:
            raise ConfigError(str(file), f"cannot read the file: {error.strerror}") from error
        for line in iter(source.readline, b""):
            if line.strip():
                yield line


def write(answer: dict[str, object]) -> None:
    """Write one line and flush it."""
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()
