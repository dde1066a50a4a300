"""Two processes of one gateway share load, prompts and ejections over a hub."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from matrixinfer.config import OutliersConfig
from matrixinfer.pods.outliers import Outliers
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.link import Peers
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.local import Hub, LocalChannel
from tests.waiting import eventually

CHAIN = list(range(100, 110))


class End:
    def __init__(self, path: Path) -> None:
        self.load = LoadLedger(time.monotonic, 60.0)
        self.history = RoutingHistory()
        self.loads = PeerLoads(uuid.uuid4().hex)
        self.outliers = Outliers(OutliersConfig(consecutive_failures=1, eject_seconds=60.0), time.monotonic)
        self.peers = Peers(
            LocalChannel(path),
            loads=self.loads,
            load=self.load,
            history=self.history,
            trust_of=lambda name: "partial" if name in "ab" else None,
            outliers=self.outliers,
        )


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[tuple[End, End]]:
    one, other = End(tmp_path / "hub"), End(tmp_path / "hub")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(Hub(tmp_path / "hub"))
        for end in (one, other):
            await stack.enter_async_context(end.peers)
        await eventually(lambda: one.peers.count() == other.peers.count() == 1)
        yield one, other


async def test_load_and_prompts_of_one_count_at_the_other(ends: tuple[End, End]) -> None:
    one, other = ends
    charge = one.load.charge("a", "m", hashes=CHAIN, start=0, queued_tokens=500)
    await eventually(lambda: other.load.pending("a", "m", CHAIN, 0) == len(CHAIN))

    def load() -> tuple[int, int] | None:
        found = other.loads.totals(time.monotonic()).get("a")
        return None if found is None else (found.in_flight, found.queued_tokens)

    await eventually(lambda: load() == (1, 500))
    charge.release()
    await eventually(lambda: load() is None)


async def test_an_ejection_by_one_counts_at_the_other_until_it_is_over(ends: tuple[End, End]) -> None:
    one, other = ends
    one.outliers.failed("a", "broke")
    one.outliers.failed("unknown", "broke")
    await eventually(lambda: other.outliers.withheld(["a", "b"]) == {"a": "ejected by another gateway"})
    assert other.outliers.reason("unknown") is None  # the other has no such endpoint
    one.outliers.succeeded("a", probe=True)
    await eventually(lambda: other.outliers.withheld(["a", "b"]) == {})
