"""vLLM's kinds of attention: the gateway predicts every hit from the events alone, or names the limit."""

from __future__ import annotations

from typing import Any

import pytest

from matrixinfer.kvevents.limits import CHUNKED, SPARSE_WINDOWS
from matrixinfer.sim.attention import Group, Layout
from matrixinfer.sim.cache import PagedPrefixCache

from .recorded import Row, Shape, check, record

SIZE = 16
FULL_KINDS = {"full": ["full"], "mla": ["mla"], "sink": ["sink_full"]}
SEVERAL = {
    "sliding": ["full", "sliding:100"],
    "short window": ["full", "sliding:17"],
    "two windows": ["sliding:100", "full", "sliding:40"],
    "sliding mla": ["mla", "sliding_mla:64"],
    "coarser window": ["full@16", "sliding:100@32"],
    "finer window": ["full@32", "sliding:60@16"],
    "mamba": ["full", "mamba"],
    "three mambas": ["mamba", "mamba", "mamba", "mla"],
    "mamba and window": ["full", "sliding:60", "mamba"],
    "two full": ["full", "mla"],
}


def layout(attention: list[str], **more: Any) -> Layout:
    return Layout(groups=tuple(Group.parse(text, SIZE) for text in attention), **more)


def recorded(layout: Layout, seed: int, *, media: float = 0.0, **meta: Any) -> list[Row]:
    shape = Shape(requests=160, longest=12 * SIZE, unit=layout.unit, chunk=max(64, 2 * layout.unit), media=media)
    blocks = 50 * sum(layout.unit // group.block_size for group in layout.groups)
    cache = PagedPrefixCache(blocks, SIZE, layout=layout)
    return record(cache, seed=seed, shape=shape, meta=meta)


def check_exact(rows: list[Row]) -> None:
    report, counts = check(rows)
    assert report.mismatches == []
    assert report.unsupported == {}
    assert report.requests == counts["lookups"] > 140
    assert min(counts["hits"], counts["BlockRemoved"], counts["AllBlocksCleared"]) > 2
    assert [publisher.limits for publisher in report.publishers] == [()]


@pytest.mark.parametrize("kind", [*FULL_KINDS, *SEVERAL])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_every_hit_is_predicted(kind: str, dense: bool) -> None:
    check_exact(recorded(layout((FULL_KINDS | SEVERAL)[kind], dense=dense), seed=1))


@pytest.mark.parametrize("kind", [*FULL_KINDS, *SEVERAL])
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_hit_is_predicted_with_lookahead(kind: str, tokens: int) -> None:
    check_exact(recorded(layout((FULL_KINDS | SEVERAL)[kind], lookahead=tokens), seed=2))


@pytest.mark.parametrize("kind", [*FULL_KINDS, *SEVERAL])
def test_every_hit_is_predicted_where_blocks_are_known_to_be_dropped(kind: str) -> None:
    dropping = layout((FULL_KINDS | SEVERAL)[kind], drop=True)
    groups = [{"eagle": number in dropping.dropping} for number in range(len(dropping.groups))]
    check_exact(recorded(dropping, seed=3, use_eagle=True, groups=groups))


@pytest.mark.parametrize("kind", [*FULL_KINDS, *SEVERAL])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_every_hit_is_predicted_with_media(kind: str, lookahead: int) -> None:
    rows = recorded(layout((FULL_KINDS | SEVERAL)[kind], lookahead=lookahead), seed=4, media=0.4)
    check_exact(rows)
    assert sum(len(row.get("mm_features", ())) > 1 for row in rows) > 20


@pytest.mark.parametrize("kind", [*FULL_KINDS, *SEVERAL])
def test_every_hit_is_predicted_with_media_where_blocks_are_dropped(kind: str) -> None:
    dropping = layout((FULL_KINDS | SEVERAL)[kind], drop=True)
    groups = [{"eagle": number in dropping.dropping} for number in range(len(dropping.groups))]
    check_exact(recorded(dropping, seed=5, media=0.4, use_eagle=True, groups=groups))


@pytest.mark.parametrize("seed", range(2))
def test_windows_alone_are_predicted_if_they_are_dense(seed: int) -> None:
    check_exact(recorded(layout(["sliding:100"], dense=True), seed))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("kind", "limit"), [(["full", "chunked:64"], CHUNKED), (["sliding:100"], SPARSE_WINDOWS)])
def test_what_events_do_not_say_is_named_and_hits_are_only_ever_longer(kind: list[str], limit: str, seed: int) -> None:
    report, counts = check(recorded(layout(kind), seed))
    assert report.mismatches == []
    assert set(report.unsupported.values()) == {limit}
    assert report.publishers[0].limits == (limit,)
    assert counts["hits"] > 3


@pytest.mark.parametrize("seed", range(2))
def test_chunked_attention_is_predicted_where_its_chunk_is_known(seed: int) -> None:
    rows = recorded(layout(["full", "chunked:64"]), seed, groups=[{}, {"attention_chunk_size": 64}])
    report, counts = check(rows)
    assert report.mismatches == []
    assert counts["hits"] > 3
