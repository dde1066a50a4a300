"""The few words on why a request went where it did."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from matrixinfer.routing.decision_log import record
from matrixinfer.routing.reasons import reason

from .test_decision_log import decision


def why(*candidates: dict[str, Any], filtered: dict[str, str] | None = None, moved: str | None = None) -> str:
    """The reason of a decision for the first of some candidates."""
    base = decision(pods=len(candidates))
    made = [msgspec.structs.replace(each, **change) for each, change in zip(base.candidates, candidates, strict=True)]
    kept = record(replace(base, candidates=made, ranked=made, filtered=filtered or {}), "/v1/completions", [], {})
    if moved is not None:
        kept.moved(moved)
    return reason(kept)


def test_each_kind_of_reason_has_its_words() -> None:
    none, some, most = {"matched_blocks": 0}, {"matched_blocks": 2}, {"matched_blocks": 5}
    busy = most | {"in_flight": 9}
    assert why(some) == "the only pod of this model"
    assert why(none, none) == "no pod is known to hold any of it; the other scores decide"
    assert why(most, some) == "holds the most of it: 5 of 6 blocks"
    assert why(some | {"in_flight": 0}, busy) == "p1 holds more (5 of 6 blocks), but is busier"
    assert why(some, most | {"in_flight": 0}) == "p1 holds more (5 of 6 blocks), but scores lower"
    assert why(most, some, moved="p1") == "p0 failed or refused it"


def test_a_pod_that_was_left_out_is_named_with_its_reason() -> None:
    base = decision(pods=3, filtered=0)
    best = base.candidates[2]
    kept = record(
        replace(base, ranked=base.candidates[:2], filtered={best.name: "ejected for 3.0 s more"}),
        "/v1/completions",
        [],
        {},
    )
    assert reason(kept) == "p2 holds more (2 of 6 blocks), but is left out: ejected for 3.0 s more"
    assert kept.view()["reason"] == reason(kept)
