"""Decisions are the recorded ones. `python -m tests.unit.routing.test_recorded_decisions` records them again."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

from .recorded import record

RECORD = Path(__file__).parents[2] / "data" / "decisions.txt.gz"


async def decisions() -> list[str]:
    return [each async for each in record()]


async def test_decisions_are_as_recorded() -> None:
    lines = await decisions()
    assert lines == gzip.decompress(RECORD.read_bytes()).decode().splitlines()


if __name__ == "__main__":
    text = "\n".join(asyncio.run(decisions()))
    RECORD.write_bytes(gzip.compress(text.encode(), mtime=0))
