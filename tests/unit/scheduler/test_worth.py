from __future__ import annotations

import pytest

from matrixinfer.config import WeightsConfig
from matrixinfer.scheduler.framework import Candidate, Trust
from matrixinfer.scheduler.worth import worth

WEIGHTS = WeightsConfig(host=0.8, storage=0.5, unproven=0.75)


@pytest.mark.parametrize(
    ("trust", "match", "tiers", "assumed", "sent", "counts"),
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
    trust: Trust, match: int, tiers: tuple[int, ...], assumed: int, sent: int, counts: float
) -> None:
    assert worth(trust, WEIGHTS, match=match, tiers=tiers, assumed=assumed, sent=sent) == pytest.approx(counts)


def test_a_candidate_holds_what_its_blocks_are_worth_and_what_is_on_its_way() -> None:
    plain = Candidate(name="a", url="", match_blocks=4, assumed_blocks=2)
    assert (plain.held_blocks, Candidate(name="a", url="").held_blocks) == (6, 0)
    assert Candidate(name="a", url="", match_blocks=4, assumed_blocks=2, worth=2.5).held_blocks == 4.5


@pytest.mark.parametrize(
    ("fields", "hit"),
    [
        ({"match_blocks": 3}, 96),
        ({"match_blocks": 3, "match_tail": 16}, 112),
        ({"match_blocks": 3, "match_tail": 16, "engine_block": 64}, 64),
        ({"match_blocks": 3, "assumed_blocks": 1}, 128),
        ({"match_blocks": 3, "sent_blocks": 5}, 160),
        ({"match_blocks": 3, "sent_blocks": 2}, 96),
        ({"sent_blocks": 2}, 64),
        ({"match_blocks": 9}, 192),
        ({}, 0),
    ],
)
def test_a_hit_is_expected_in_whole_engine_blocks_short_of_the_last_token(fields: dict[str, int], hit: int) -> None:
    candidate = Candidate(name="a", url="", **{"engine_block": 16, **fields})  # type: ignore[arg-type]  # all are numbers
    assert candidate.expected_hit(200, 32) == hit
    assert candidate.expected_hit(None, 32) == candidate.expected_hit(0, 32) == 0
