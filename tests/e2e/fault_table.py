"""The table of the fault matrix in the documentation, as the tests measure it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
HEAD = """\
| fault | load | sent | answered once | failed visibly | success from 2 s on | left out after | used again after |
|---|---|---|---|---|---|---|---|
"""
_TABLE = re.compile(r"(?<=<!-- make fault-table -->\n\n).*?(?=\n<!-- end -->)", re.DOTALL)


def rows(page: str) -> list[tuple[str, str]]:
    """Fault and load of each row."""
    table = _TABLE.search(page)
    return [] if table is None else re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", table[0], flags=re.MULTILINE)[1:]


def replaced(page: str, lines: list[str]) -> str:
    """The page with another table."""
    return _TABLE.sub(lambda _: HEAD + "".join(f"{line}\n" for line in lines), page)
