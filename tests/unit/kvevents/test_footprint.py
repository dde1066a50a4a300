"""How full a cache is, as its own events report it."""

from __future__ import annotations

from matrixinfer.blocks import TokenBlockProcessor

from .support import CLEARED, Follower, removed, stored

PROMPT = list(range(48))


def follower() -> Follower:
    return Follower(TokenBlockProcessor(8))


def test_a_cache_holds_its_distinct_blocks_on_the_device() -> None:
    same = follower()
    footprint = same.ledger.footprint
    assert (footprint.held_tokens, footprint.capacity(None), footprint.capacity(400)) == (0, None, 400)
    same.apply(stored([11, 12, 13], PROMPT[:12]), stored([11, 12], PROMPT[:8], medium="CPU"))
    assert (footprint.held_tokens, footprint.evicted_tokens) == (12, 0)
    same.apply(removed([11, 12], medium="CPU"))
    assert (footprint.held_tokens, footprint.evicted_tokens) == (12, 0)


def test_a_cache_that_evicts_is_as_large_as_what_it_held() -> None:
    same = follower()
    footprint = same.ledger.footprint
    same.apply(stored([11, 12, 13], PROMPT[:12]))
    same.apply(removed([13]), stored([21], [7] * 4))
    assert (footprint.held_tokens, footprint.evicted_tokens) == (12, 4)
    assert footprint.capacity(400) == footprint.capacity(None) == 12
    same.apply(CLEARED)
    assert (footprint.held_tokens, footprint.capacity(400)) == (0, 12)


def test_another_engine_begins_again() -> None:
    same = follower()
    footprint = same.ledger.footprint
    same.apply(stored([11, 12, 13], PROMPT[:12]))
    same.apply(removed([13]))
    same.ledger.reset()
    assert (footprint.held_tokens, footprint.evicted_tokens, footprint.capacity(400)) == (0, 0, 400)
