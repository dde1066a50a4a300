"""Reads facts about an engine from the text of its Python files, with `ast`: nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from watch.sources import CannotRead


@dataclass(frozen=True, kw_only=True)
class Struct:
    """A `msgspec.Struct`, with what it inherits."""

    name: str
    fields: tuple[str, ...]
    is_array: bool = False
    tag_field: str | None = None
    """The key that holds the tag, where it has one."""
    tag: str | None = None


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    path: str
    text: str
    tree: ast.Module = field(repr=False)

    def structs(self) -> dict[str, Struct]:
        """Every class, read as a `msgspec.Struct`."""
        classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}
        return {name: _struct(name, classes) for name in classes}

    def values(self, enum: str) -> list[str] | None:
        """The values of an enumeration of strings; None if there is no such class."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == enum:
                return [value for _, value in _assigned(node)]
        return None

    def constants(self, prefix: str) -> list[str]:
        """The strings assigned at module level to names that begin with `prefix`."""
        return [value for name, value in _assigned(self.tree) if name.startswith(prefix)]

    def named_in(self, name: str) -> set[str]:
        """The file's classes that the annotations in a class name."""
        classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}
        if name not in classes:
            return set()
        lines = [line.annotation for line in classes[name].body if isinstance(line, ast.AnnAssign)]
        return {each.id for line in lines for each in ast.walk(line) if isinstance(each, ast.Name)} & classes.keys()

    def words(self) -> set[str]:
        """Every string and every annotated name in the file."""
        words: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                words.add(node.target.id)
        return words

    def sent_parts(self) -> set[int]:
        """The numbers of parts of the multipart messages that are sent."""
        return {
            len(call.args[0].elts)
            for call in ast.walk(self.tree)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "send_multipart"
            and call.args
            and isinstance(call.args[0], ast.Tuple | ast.List)
        }


def parse(path: str, text: str) -> Module:
    """Parse a file. Raises `CannotRead`."""
    try:
        return Module(path, text, ast.parse(text))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise CannotRead(f"{path} cannot be parsed: {error}. Run the watch with a newer Python") from error


def _struct(name: str, classes: dict[str, ast.ClassDef]) -> Struct:
    fields: dict[str, None] = {}
    settings: dict[str, object] = {}
    for node in _ancestry(name, classes):
        fields |= dict.fromkeys(_fields(node))
        settings |= dict(_settings(node))
    is_tagged = settings.get("tag") not in (None, False) or "tag_field" in settings
    tag = settings.get("tag")
    return Struct(
        name=name,
        fields=tuple(fields),
        is_array=bool(settings.get("array_like")),
        tag_field=str(settings.get("tag_field") or "type") if is_tagged else None,
        tag=(tag if isinstance(tag, str) else name) if is_tagged else None,
    )


def _ancestry(name: str, classes: dict[str, ast.ClassDef], seen: tuple[str, ...] = ()) -> Iterator[ast.ClassDef]:
    """The class after those of its bases that the file has."""
    if name not in classes or name in seen:
        return
    for base in classes[name].bases:
        if isinstance(base, ast.Name):
            yield from _ancestry(base.id, classes, (*seen, name))
    yield classes[name]


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for line in node.body:
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and "ClassVar" not in ast.unparse(line)
        ):
            yield line.target.id


def _settings(node: ast.ClassDef) -> Iterator[tuple[str, object]]:
    for key in node.keywords:
        if key.arg is not None and isinstance(key.value, ast.Constant):
            yield key.arg, key.value.value


def _assigned(node: ast.Module | ast.ClassDef) -> Iterator[tuple[str, str]]:
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
            for target in line.targets:
                if isinstance(target, ast.Name):
                    yield target.id, line.value.value
