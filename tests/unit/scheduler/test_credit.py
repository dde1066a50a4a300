from __future__ import annotations

import pytest

from matrixinfer.config import WeightsConfig
from matrixinfer.scheduler.credit import cached_credit
from matrixinfer.scheduler.framework import Candidate, Trust

WEIGHTS = WeightsConfig(host=0.8, storage=0.5, unproven=0.75)


@pytest.mark.parametrize(
    ("trust", "match", "tiers", "pending", "recent", "counts"),
    [
        ("exact", 10, (), 0, 0, 10),
        ("exact", 10, (4,), 0, 0, 4 + 0.8 * 6),
        ("exact", 10, (4, 8), 0, 0, 4 + 0.8 * 4 + 0.5 * 2),
        ("exact", 10, (4, 4), 0, 0, 4 + 0.5 * 6),
        ("exact", 10, (0, 10), 3, 99, 0.8 * 10),
        ("partial", 10, (), 0, 0, 10),
        ("partial", 10, (), 0, 14, 10 + 0.75 * 4),
        ("partial", 10, (), 3, 14, 10 + 0.75 * 1),
        ("partial", 10, (), 3, 12, 10),
        ("partial", 10, (), 0, 4, 10),
        ("stale", 10, (), 0, 0, 0.75 * 10),
        ("stale", 10, (5,), 0, 12, 0.75 * (5 + 0.8 * 5) + 0.75 * 2),
        ("none", 0, (), 0, 8, 0.75 * 8),
        ("none", 0, (), 3, 8, 0.75 * 5),
        ("none", 0, (), 9, 8, 0),
    ],
)
def test_blocks_count_by_tier_and_trust(
    trust: Trust, match: int, tiers: tuple[int, ...], pending: int, recent: int, counts: float
) -> None:
    assert cached_credit(trust, WEIGHTS, match=match, tiers=tiers, pending=pending, recent=recent) == pytest.approx(
        counts
    )


@pytest.mark.parametrize(
    ("trust", "match", "pending", "recent", "counts"),
    [("exact", 2, 0, 0, 2 + 3), ("partial", 2, 0, 4, 2 + 1.5 + 3), ("none", 0, 1, 2, 0.75 + 3)],
)
def test_what_the_bytes_add_counts_like_what_was_sent_lately(
    trust: Trust, match: int, pending: int, recent: int, counts: float
) -> None:
    credit = cached_credit(trust, WEIGHTS, match=match, tiers=(), pending=pending, recent=recent, guessed=4)
    assert credit == pytest.approx(counts)


def test_credit_and_hits_are_scaled_by_what_answers_report() -> None:
    candidate = Candidate(name="a", url="", matched_blocks=4, pending_blocks=2, engine_block=16, reuse=0.5)
    assert (candidate.credit, candidate.cached_hit(200, 32), candidate.predicted_hit(200, 32)) == (3, 192, 96)


def test_a_candidates_credit_includes_pending_blocks() -> None:
    plain = Candidate(name="a", url="", matched_blocks=4, pending_blocks=2)
    assert (plain.credit, Candidate(name="a", url="").credit) == (6, 0)
    assert Candidate(name="a", url="", matched_blocks=4, pending_blocks=2, cached_credit=2.5).credit == 4.5


@pytest.mark.parametrize(
    ("fields", "hit"),
    [
        ({"matched_blocks": 3}, 96),
        ({"matched_blocks": 3, "matched_tail": 16}, 112),
        ({"matched_blocks": 3, "matched_tail": 16, "engine_block": 64}, 64),
        ({"matched_blocks": 3, "pending_blocks": 1}, 128),
        ({"matched_blocks": 3, "recent_blocks": 5}, 160),
        ({"matched_blocks": 3, "recent_blocks": 2}, 96),
        ({"recent_blocks": 2}, 64),
        ({"matched_blocks": 9}, 192),
        ({}, 0),
    ],
)
def test_a_hit_is_expected_in_whole_engine_blocks_short_of_the_last_token(fields: dict[str, int], hit: int) -> None:
    candidate = Candidate(name="a", url="", **{"engine_block": 16, **fields})  # type: ignore[arg-type]  # all are numbers
    assert candidate.predicted_hit(200, 32) == hit
    assert candidate.predicted_hit(None, 32) == candidate.predicted_hit(0, 32) == 0
