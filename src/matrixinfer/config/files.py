"""Files that the configuration names: where they are, and whether one is still what was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec

Stamp: TypeAlias = tuple[int, int, int]
_Section = TypeVar("_Section", bound=msgspec.Struct)


def stamp(file: str | Path) -> Stamp | None:
    """What changes when a file does, also when it is a link that now points elsewhere; None if it cannot be looked at."""
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def with_absolute_files(section: _Section, base: Path) -> _Section:
    """The section with absolute paths in all settings that end in `_file`, also in sections within it.

    Relative ones start from `base`. Links are kept: Kubernetes replaces mounted files by pointing a link elsewhere.
    """
    values = {name: getattr(section, name) for name in section.__struct_fields__}
    new = {name: _absolute(name, value, base) for name, value in values.items()}
    changed = {name: value for name, value in new.items() if value is not values[name]}
    return msgspec.structs.replace(section, **changed) if changed else section


def _absolute(name: str, value: Any, base: Path) -> Any:
    if isinstance(value, str):
        return str((base / value).absolute()) if name.endswith("_file") else value
    if isinstance(value, msgspec.Struct):
        return with_absolute_files(value, base)
    if isinstance(value, tuple):
        items = tuple(_absolute(name, each, base) for each in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
