"""The part of the tutorial on simulated engines, as it stands on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tutorial import Ports, blocks, play


def plain(output: str) -> list[str]:
    """Without what differs from run to run: times, which of two idle engines was first, and spaces at the ends of lines."""
    output = re.sub(r"\d\d:\d\d:\d\d", "12:00:00", output)
    return [
        re.sub(r"\s+", " ", line.replace("127.0.0.1:8002", "127.0.0.1:8001")).strip() for line in output.splitlines()
    ]


@pytest.mark.slow
def test_every_block_on_simulated_engines_works_and_prints_what_is_shown(tmp_path: Path) -> None:
    found = blocks("Two simulated engines")
    ports = Ports.of(found)
    printed = [
        ports.names(each) for each in play([ports.put(each.commands) for each in found], tmp_path, seconds=300.0)
    ]
    assert "2 pods: no problems found" in "\n".join(printed)
    shown = [(each.shown, said) for each, said in zip(found, printed, strict=True) if each.shown is not None]
    assert len(shown) == 2
    for expected, said in shown:
        assert plain(said) == plain(expected)
