"""The configuration's reference page, written from the schema itself."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from matrixinfer.config import Config, Section
from matrixinfer.scheduler.framework import Plugin

_HEAD = """# Configuration

One YAML file, read at start: `matrixinfer serve --config FILE`. Keys not listed here are errors, as are values of the
wrong type or range; the message names the key's path and what was expected. `matrixinfer config check FILE` checks a
file without starting anything.

This page is made from the schema by `matrixinfer config reference`.
"""


def configuration_page(plugins: Mapping[str, type[Plugin]]) -> str:
    """The page as Markdown: a table per section, then one per plugin."""
    parts = [_HEAD]
    for path, section in _sections(Config, ""):
        title = f"`{path}`" if path else "Top level"
        parts.append(f"## {title}\n\n{_first_line(section)}\n\n{_table(section)}")
    parts.append("## Plugins\n\nEnabled under `scheduler.plugins`, with arguments under `scheduler.pluginConfig`.\n")
    for name, plugin in sorted(plugins.items()):
        parts.append(f"### `{name}`\n\n{_first_line(plugin)}\n\n{_table(plugin.Args)}")
    return "\n".join(parts)


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    hints = get_type_hints(section)
    for field in msgspec.structs.fields(section):
        for kind, suffix in _structs_in(hints[field.name]):
            yield from _sections(kind, f"{path}.{field.encode_name}{suffix}".lstrip("."))


def _structs_in(kind: Any, suffix: str = "") -> Iterator[tuple[type[Section], str]]:
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind, suffix
    inner = "[]" if get_origin(kind) is tuple else suffix
    for argument in get_args(kind):
        yield from _structs_in(argument, inner)


def _table(section: type[Section]) -> str:
    fields = msgspec.structs.fields(section)
    if not fields:
        return "No settings.\n"
    hints = get_type_hints(section, include_extras=True)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        kind, metas = _unwrap(hints[field.name])
        meaning = next((meta.description for meta in metas if meta.description), "")
        shown = _type_name(kind) + "".join(_bounds(meta) for meta in metas)
        rows.append(f"| `{field.encode_name}` | {shown} | {_default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _unwrap(kind: Any) -> tuple[Any, list[Meta]]:
    metas: list[Meta] = []
    while get_origin(kind) is Annotated:
        kind, *extras = get_args(kind)
        metas += [extra for extra in extras if isinstance(extra, Meta)]
    return kind, metas


def _bounds(meta: Meta) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return "".join(f" {sign} {value:g}" for key, sign in signs.items() if (value := getattr(meta, key)) is not None)


def _type_name(kind: Any) -> str:
    kind, _ = _unwrap(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is type(None):
        return "null"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "map"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "section"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}.get(kind, "any")


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    data = msgspec.to_builtins(value)
    if isinstance(data, dict) and isinstance(value, Section):
        return "see below"
    return f"`{msgspec.json.encode(data).decode()}`"


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
