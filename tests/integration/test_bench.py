"""The benchmarks run to their end. What they measure is not judged here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["decision", "look-up", "references", "ingest", "growth", "engines", "proxy", "redis"])
def test_a_part_runs_and_every_figure_is_a_number(part: str) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--json", "--only", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["parts"][part]
    assert figures
    assert all(math.isfinite(figure["value"]) for figure in figures)
    assert all(figure["holds"] is (figure["value"] <= figure["aim"]) for figure in figures if figure["aim"] is not None)
