"""The benchmarks run to their end. What they measure is not judged here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "part",
    ["decision", "lookup", "references", "ingest", "growth", "engines", "proxy", "redis", "first byte", "dashboard"],
)
def test_a_part_runs_and_every_figure_is_a_number(part: str) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--json", "--only", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["seconds"][part] > 0
    figures = printed["parts"][part]
    assert figures
    assert all(math.isfinite(figure["value"]) for figure in figures)
    judged = [figure for figure in figures if figure["target"] is not None]
    assert all(figure["met"] is (figure["value"] <= figure["target"]) for figure in judged)


def test_the_load_for_routers_runs_through_ours(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.peers", "--quick", "--json", "--ours-only", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert all(math.isfinite(figure["value"]) for figures in parts.values() for figure in figures)
    assert {figure["case"] for figure in parts["CPU per request or chunk"]} >= {"2 KiB, new", "2 KiB, streamed chunk"}
