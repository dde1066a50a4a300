"""The lists of files in docs/architecture.md are true to the code: each file exists, and imports connect them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "matrixinfer"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    start = PAGE.index(f"## {title}")
    end = PAGE.find("\n## ", start)
    return PAGE[start : end if end > 0 else None]


def files_of(title: str) -> list[str]:
    """The files that the numbered list of a section names, in order."""
    text = section(title)
    steps = text[text.index("\n1. ") : text.rindex(".\n") + 2]
    return list(dict.fromkeys(re.findall(r"`([a-z_/]+\.py)`", steps)))


def imports_of(file: str) -> set[str]:
    """The files of the package that a file imports, also within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((SOURCE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("matrixinfer"):
            base = node.module.removeprefix("matrixinfer").removeprefix(".").replace(".", "/")
            found.add(f"{base}.py")
            found |= {f"{base}/{alias.name}.py".removeprefix("/") for alias in node.names}
    return found


@pytest.mark.parametrize("title", ["The way of a request", "The way of an event"])
def test_each_file_on_the_way_is_imported_by_an_earlier_one_or_imports_one(title: str) -> None:
    files = files_of(title)
    assert len(files) > 8
    for number, file in enumerate(files[1:], start=1):
        earlier = files[:number]
        linked = imports_of(file) & set(earlier) or any(file in imports_of(other) for other in earlier)
        assert linked, f"{file} is linked with none of {earlier}"


def test_every_file_that_the_page_names_exists() -> None:
    for name in re.findall(r"`([a-z_]+/[a-z_/]*\.?[a-z]*)`", PAGE):
        assert (SOURCE / name).exists() or (ROOT / name).exists(), name


def test_every_file_of_the_shared_index_that_the_page_names_is_in_its_folder() -> None:
    names = set(re.findall(r"`([a-z_]+\.py)`", section("The shared index")))
    assert names > {"writer.py", "reader.py"}
    for name in names:
        assert (SOURCE / "index" / "redis" / name).exists(), name


def test_every_file_in_the_row_of_a_package_is_in_that_package() -> None:
    for package, cell in re.findall(r"^\| `([a-z]+)/` \| (.*) \|$", PAGE, re.MULTILINE):
        for name in re.findall(r"`([a-z_]+\.py)`", cell):
            assert (SOURCE / package / name).exists(), f"{package}/{name}"
