"""Which keys differ between two configurations. Values are left out: some are secrets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from matrixinfer.config.schema import Config


def changed_keys(before: Config, after: Config) -> list[str]:
    """The paths of the keys that differ, such as `limits.maxBodyBytes` and `pods[a].url`, in the order of the schema."""
    return list(_changes(before, after, ""))


def _changes(before: Any, after: Any, path: str) -> Iterator[str]:
    if before == after:
        return
    if isinstance(before, msgspec.Struct) and type(before) is type(after):
        for field in msgspec.structs.fields(type(before)):
            key = f"{path}.{field.encode_name}".lstrip(".")
            yield from _changes(getattr(before, field.name), getattr(after, field.name), key)
        return
    old, new = _by_name(before), _by_name(after)
    if old is None or new is None or (list(old) != list(new) and old.keys() == new.keys()):
        yield path
        return
    for name in [*old, *(name for name in new if name not in old)]:
        if name in old and name in new:
            yield from _changes(old[name], new[name], f"{path}[{name}]")
        else:
            yield f"{path}[{name}]"


def _by_name(values: object) -> dict[str, object] | None:
    """The items of a list by their names; None if not every item has one."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    found = {str(name): each for each in values if (name := getattr(each, "name", None)) is not None}
    return found if len(found) == len(values) else None
