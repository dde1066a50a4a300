"""SGLang's radix tree: the gateway predicts every hit from the events alone."""

from __future__ import annotations

import pytest

from matrixinfer.feedtools.facts import EXTRA_KEY, EXTRA_KEY_SHARED
from matrixinfer.sim.radix import RadixCache

from .recorded import Shape, check, record


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pairs", [False, True], ids=["plain", "pairs"])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_every_hit_is_predicted(size: int, pairs: bool, seed: int) -> None:
    shape = Shape(unit=size, longest=60 if size == 1 else 150)
    cache = RadixCache(4 * shape.longest // size, size, pairs=pairs)
    rows = record(cache, seed=seed, shape=shape, meta={"page_size": size})
    report, counts = check(rows)
    assert report.mismatches == []
    assert report.unsupported == {}
    assert report.requests == counts["lookups"] > shape.requests * 0.9
    assert min(counts["hits"], counts["BlockRemoved"], counts["AllBlocksCleared"]) > 3
    assert [publisher.limits for publisher in report.publishers] == [()]


@pytest.mark.parametrize("seed", range(3))
def test_a_clients_extra_key_is_in_no_event_and_named_as_the_reason(seed: int) -> None:
    cache = RadixCache(60, 16)
    rows = record(cache, seed=seed, shape=Shape(extra_keys=0.2), meta={"page_size": 16})
    report, counts = check(rows)
    assert report.mismatches == []
    assert set(report.unsupported.values()) == {EXTRA_KEY, EXTRA_KEY_SHARED}
    assert report.requests == counts["lookups"] - len(report.unsupported) > 50
