"""Turns msgspec's errors into a path in the configuration and the value that was expected there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

_WORDS = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
_YAML_NAMES = {"array": "list", "object": "mapping"}


def explain(error: str, kind: Any) -> tuple[str, str]:
    """The path of an error below `kind`, and what was expected there."""
    parts = re.fullmatch(r"(.*?)(?: - at (`key` in )?`\$(.*)`)?", error, re.DOTALL)
    message, is_key, where = parts.groups() if parts else (error, None, None)
    where = where or ""
    unknown = re.search(r"unknown field `([^`]*)`", message)
    if unknown:
        key = unknown.group(1)
        return f"{where}.{key}", f"unknown key; {_hint(key, _keys_of(_kind_at(kind, where)))}"
    if message.startswith("Invalid enum value"):
        value = message.partition("'")[2].removesuffix("'")
        return where, f"unknown value `{value}`; {_hint(value, _literals_of(_kind_at(kind, where)))}"
    missing = re.fullmatch(r"Object missing required field `(.*)`", message)
    if missing:
        return where, f"missing the required key `{missing.group(1)}`"
    message = message[:1].lower() + message[1:]
    message = re.sub(r"expected `([^`]*)`", lambda found: f"expected {_in_words(found.group(1), kind, where)}", message)
    message = re.sub(r"got `([^`]*)`", lambda found: f"got {_YAML_NAMES.get(found.group(1), found.group(1))}", message)
    return where, f"{message} as a key" if is_key else message


def _in_words(types: str, kind: Any, where: str) -> str:
    """Such as `a string or null` for `str | null`, with the default as an example if it is a string."""
    words = [_WORDS.get(name, f"`{name}`") for name in types.split(" | ")]
    example = _default_at(kind, where)
    if isinstance(example, str) and example and "a string" in words:
        words[words.index("a string")] = f"a string such as {example}"
    return " or ".join(words)


def _default_at(kind: Any, where: str) -> object:
    """The default of the field at `where`; None if it has none."""
    parent, dot, key = where.rpartition(".")
    struct = _struct_in(_kind_at(kind, parent)) if dot else None
    fields = msgspec.structs.fields(struct) if struct else ()
    return next((field.default for field in fields if field.encode_name == key), None)


def _hint(name: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(valid)}"


def _kind_at(kind: Any, where: str) -> Any:
    """The type of the value at `where`, a path below `kind` as msgspec prints it: `.pods[0].url`."""
    for key in re.findall(r"\.([A-Za-z0-9_]+)|\[[^\]]*\]", where):
        if key:
            struct = _struct_in(kind)
            if struct is None:
                return object
            names = {field.encode_name: field.name for field in msgspec.structs.fields(struct)}
            kind = get_type_hints(struct).get(names.get(key, ""), object)
        else:
            arguments = [a for a in get_args(_container_in(kind)) if a is not Ellipsis]
            kind = arguments[-1] if arguments else object
    return kind


def _keys_of(kind: Any) -> list[str]:
    struct = _struct_in(kind)
    return [field.encode_name for field in msgspec.structs.fields(struct)] if struct else []


def _literals_of(kind: Any) -> list[str]:
    return [value for option in _options(kind) if get_origin(option) is Literal for value in get_args(option)]


def _options(kind: Any) -> list[Any]:
    return list(get_args(kind)) if get_origin(kind) is Union or type(kind).__name__ == "UnionType" else [kind]


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    return next((k for k in _options(kind) if isinstance(k, type) and issubclass(k, msgspec.Struct)), None)


def _container_in(kind: Any) -> Any:
    return next((k for k in _options(kind) if get_origin(k) in (tuple, list, dict, Mapping)), None)
