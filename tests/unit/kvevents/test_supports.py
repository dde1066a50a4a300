"""The memory that counts of supports take."""

import pytest

from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.room import is_roomy
from matrixinfer.kvevents.supports import Supports


def test_counts_keep_no_room_for_blocks_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[bool] = []
    monkeypatch.setattr("matrixinfer.kvevents.supports.is_roomy", lambda counts: _noted(counts, copied))
    supports, names = Supports("pod-a", MemoryIndex()), list(range(1, 60_001))
    for start in range(0, 60_000, 100):
        supports.add("llama", names[start : start + 100], None)
        if start >= 12_000:
            supports.remove("llama", names[start - 12_000 : start - 11_900])
    assert len(supports) == 12_000
    assert supports.held("llama", names[-12_000:]) == 12_000
    assert 0 < sum(copied) < 10, "copied again and again"


def _noted(counts: dict[int, int], copied: list[bool]) -> bool:
    copied.append(is_roomy(counts))
    return copied[-1]
