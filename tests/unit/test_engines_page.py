"""Every row of the tables of layouts and of predictions in docs/engines.md names what shows it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.vllm.kinds import KINDS

ROOT = Path(__file__).parents[2]
CAPTURES = ROOT / "tests" / "data" / "captures"
LAYOUTS = "| engine | layout of an event | shown by |"
PREDICTIONS = "| models, for example | with | engine | predicted | shown by |"
WORDS = ("exact", "lower bound", "approximate", "blind")


def rows(heading: str) -> list[list[str]]:
    """The cells of each row of the table with this heading; the last one says what shows it."""
    lines = (ROOT / "docs" / "engines.md").read_text().splitlines()
    start = lines.index(heading) + 2
    table = lines[start : lines.index("", start)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def names() -> list[str]:
    return [name for row in rows(LAYOUTS) + rows(PREDICTIONS) for name in re.findall(r"`([^`]+)`", row[-1])]


def exists(name: str) -> bool:
    if name.startswith("tests/"):
        path, _, test = name.partition("::")
        text = (ROOT / path).read_text() if (ROOT / path).is_file() else ""
        return bool(test) and re.search(rf"^(async )?def {test}\(", text, re.MULTILINE) is not None
    if name.startswith("kind "):
        return name.removeprefix("kind ") in KINDS
    return (CAPTURES / f"{name}.jsonl.gz").is_file()


def test_every_row_says_what_is_predicted_and_what_shows_it() -> None:
    assert all(row[3].startswith(WORDS) for row in rows(PREDICTIONS))
    assert all(re.findall(r"`[^`]+`", row[-1]) for row in rows(LAYOUTS) + rows(PREDICTIONS))


def test_what_shows_a_row_exists() -> None:
    assert [name for name in names() if not exists(name)] == []


def test_every_kind_and_every_recording_is_in_a_table() -> None:
    recordings = {file.name.removesuffix(".jsonl.gz") for file in CAPTURES.iterdir()}
    assert ({f"kind {name}" for name in KINDS} | recordings) - {*names()} == set()
