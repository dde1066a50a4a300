"""Tells whether a file is still the one that was read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[int, int, int]


def stamp(file: str | Path) -> Stamp | None:
    """What changes when a file does, also when it is a link that now points elsewhere; None if it cannot be looked at."""
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
