"""Writes the reference page of the configuration from the schema."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, structs

from matrixinfer.config import Config, PluginRef, Section
from matrixinfer.scheduler.framework import Plugin

_HEAD = """# Configuration

The gateway reads one YAML file when it starts, and again when it changes: `matrixinfer serve --config FILE`. A key that is not listed here is an
error, and so is a value of the wrong type or range; the message names the key's path and what was expected.
`matrixinfer config check FILE` checks a file without starting anything.

This page is generated from the schema by `matrixinfer config reference`.
"""


def configuration_page(plugins: Mapping[str, type[Plugin]]) -> str:
    """The page as Markdown: a table per section, then one per plugin, with the defaults that are in effect."""
    parts = [_HEAD]
    for path, section, defaults in _sections(Config, "", Config()):
        title = f"`{path}`" if path else "Top level"
        parts.append(f"## {title}\n\n{_first_line(section)}\n\n{_table(section, defaults)}")
    parts.append("## Plugins\n\nEnable them in `scheduler.plugins`; set their arguments in `scheduler.pluginConfig`.\n")
    shipped = {entry.name: entry.args for entry in Config().scheduler.plugin_config}
    for name, plugin in sorted(plugins.items()):
        parts.append(f"### `{name}`\n\n{_first_line(plugin)}\n\n{_table(plugin.Args, shipped.get(name, {}))}")
    return "\n".join(parts)


def _sections(
    section: type[Section], path: str, defaults: Section | None
) -> Iterator[tuple[str, type[Section], Mapping[str, Any]]]:
    """Each section below `section`, with its path and the values that its keys have if the file does not set them."""
    values = {} if defaults is None else {f.encode_name: getattr(defaults, f.name) for f in structs.fields(section)}
    yield path, section, values
    hints = get_type_hints(section)
    for field in structs.fields(section):
        value = values.get(field.encode_name)
        for kind, suffix in _structs_in(hints[field.name]):
            below = value if isinstance(value, kind) else None
            yield from _sections(kind, f"{path}.{field.encode_name}{suffix}".lstrip("."), below)


def _structs_in(kind: Any, suffix: str = "") -> Iterator[tuple[type[Section], str]]:
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind, suffix
    inner = "[]" if get_origin(kind) is tuple else suffix
    for argument in get_args(kind):
        yield from _structs_in(argument, inner)


def _table(section: type[Section], defaults: Mapping[str, Any]) -> str:
    fields = structs.fields(section)
    if not fields:
        return "No settings.\n"
    hints = get_type_hints(section, include_extras=True)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        _, metas = _unwrap(hints[field.name])
        meaning = next((meta.description for meta in metas if meta.description), "")
        rows.append(
            f"| `{field.encode_name}` | {_type_name(hints[field.name])} | {_default(field, defaults)} | {meaning} |"
        )
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
    kind, metas = _unwrap(kind)
    return _bare_type_name(kind) + "".join(map(_bounds, metas))


def _bare_type_name(kind: Any) -> str:
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


def _default(field: structs.FieldInfo, defaults: Mapping[str, Any]) -> str:
    if field.required:
        return "required"
    own = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    value = defaults.get(field.encode_name, own)
    if isinstance(value, Section):
        return "see below"
    if isinstance(value, tuple):
        value = [each.name if each == PluginRef(name=getattr(each, "name", "")) else each for each in value]
    return f"`{msgspec.json.encode(value).decode()}`"


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
