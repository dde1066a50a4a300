"""Prints text that may come from anywhere: names in it can neither format it nor move the cursor."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import which
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from matrixinfer.cli.arguments import WIDTH


def plain(text: str) -> str:
    """`text` with everything escaped that does not show as itself: control characters, line breaks, half characters."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def own_name() -> str:
    """The name of this command in hints to copy: `.venv/bin/matrixinfer` if it was started so and is not on the PATH."""
    started = sys.argv[0]
    return started if Path(started).name == "matrixinfer" and which("matrixinfer") is None else "matrixinfer"


class Terminal(Console):
    """A console without markup. Every string is one line, and is printed as it is, escaped by `plain`."""

    def __init__(self, *, file: TextIO | None = None) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, width=WIDTH, file=file)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print strings, texts and tables."""
        super().print(*map(_plain_object, objects), **options)


class Rows(Table):
    """A table without lines, whose cells are escaped by `plain`."""

    def __init__(self, *columns: str) -> None:
        super().__init__(*map(plain, columns), box=None)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of strings."""
        super().add_row(*map(_plain_object, cells), **options)


def standard_output() -> Terminal:
    """A terminal on standard output, as it is now."""
    return Terminal(file=sys.stdout)


def _plain_object(each: Any) -> Any:
    if isinstance(each, Text):
        each.plain = plain(each.plain)
        return each
    return Text(plain(each)) if isinstance(each, str) else each
