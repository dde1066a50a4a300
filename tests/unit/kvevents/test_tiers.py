from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents.tiers import DEVICE, HOST, STORAGE, tier_of
from matrixinfer.traffic.history import RoutingHistory

from .support import CLEARED, MODEL, POD, Follower, removed, stored

PROMPT = list(range(32))


@pytest.fixture
def ledger() -> Follower:
    return Follower(TokenBlockProcessor(4))


def tiers(follower: Follower, tokens: Sequence[int] = PROMPT, *, salt: str | None = None) -> list[int]:
    """Blocks held up to each faster tier, and in all."""
    found = follower.index.count(MODEL, follower.blocks.chain(tokens, salt=salt))
    return [found.get(name, 0) for name in (*follower.ledger.tiers.names, POD)]


@pytest.mark.parametrize(
    ("medium", "tier"),
    [("GPU", DEVICE), ("gpu", DEVICE), ("CPU", HOST), ("CPU_PINNED", HOST), ("DISK", STORAGE), ("REMOTE", STORAGE)],
)
def test_media_belong_to_tiers(medium: str, tier: int) -> None:
    assert tier_of(medium) == tier


def test_with_one_tier_the_index_has_one_name(ledger: Follower) -> None:
    ledger.apply(stored([1, 2], PROMPT[:8]))
    assert (ledger.ledger.tiers.names, tiers(ledger)) == ([], [2])


def test_what_is_off_loaded_and_evicted_is_still_held_but_not_on_the_device(ledger: Follower) -> None:
    ledger.apply(stored([1, 2, 3, 4], PROMPT[:16]))
    ledger.apply(stored([1, 2, 3, 4], PROMPT[:16], medium="CPU"))
    assert tiers(ledger) == [4, 4]
    ledger.apply(removed([4, 3]))
    assert tiers(ledger) == [2, 4]
    ledger.apply(stored([5], PROMPT[16:20], parent=2, medium="GPU"))
    ledger.apply(removed([4], medium="CPU"))
    assert tiers(ledger) == [2, 3]
    ledger.apply(stored([3, 4], PROMPT[8:16], parent=2))
    assert tiers(ledger) == [4, 4]


def test_three_tiers_are_distinguished_in_any_order(ledger: Follower) -> None:
    ledger.apply(stored([1, 2, 3], PROMPT[:12]))
    ledger.apply(stored([1, 2, 3], PROMPT[:12], medium="DISK"), removed([3, 2]))
    assert tiers(ledger) == [1, 3]
    ledger.apply(stored([1, 2], PROMPT[:8], medium="CPU"))
    assert tiers(ledger) == [1, 2, 3]
    ledger.apply(removed([2], medium="CPU"), removed([3], medium="DISK"))
    assert tiers(ledger) == [1, 1, 2]


def test_off_loaded_blocks_that_are_named_without_tokens_are_those_of_the_device(ledger: Follower) -> None:
    bare: dict[str, Any] = {"medium": "CPU", "block_size": 0}
    ledger.apply(stored([1, 2, 3, 4], PROMPT[:16]), stored([5], PROMPT[16:20], parent=4))
    ledger.apply(stored([1, 2], [], **bare), stored([3], [], **bare), stored([4, 5], [], **bare))
    ledger.apply(removed([5, 4, 3, 2, 1]))
    assert tiers(ledger) == [0, 5]
    ledger.apply(removed([5, 4], medium="CPU"))
    assert tiers(ledger) == [0, 3]
    assert ledger.ledger.stats.misfits == 0


def test_a_branch_is_off_loaded_as_one(ledger: Follower) -> None:
    other = [*PROMPT[:8], *range(100, 108)]
    ledger.apply(stored([1, 2, 3], PROMPT[:12]), stored([8, 9], other[8:], parent=2))
    for blocks in ([1, 2], [8], [3], [9]):
        ledger.apply(stored(blocks, [], medium="CPU", block_size=0))
    ledger.apply(removed([9, 8, 3, 2, 1]))
    assert (tiers(ledger), tiers(ledger, other)) == ([0, 3], [0, 4])


def test_a_salted_prompt_stays_apart_when_it_is_off_loaded(ledger: Follower) -> None:
    ledger.apply(stored([1, 2], PROMPT[:8], extra_keys=[["s"], None]))
    ledger.apply(stored([1, 2], [], medium="CPU", block_size=0), removed([2, 1]))
    assert (tiers(ledger), tiers(ledger, salt="s")) == ([0, 0], [0, 2])


def test_blocks_without_tokens_that_nobody_knows_are_orphans(ledger: Follower) -> None:
    ledger.apply(stored([1, 2], PROMPT[:8]))
    ledger.apply(stored([7], [], medium="CPU", block_size=0), stored([2], [], medium="CPU", block_size=0))
    ledger.apply(removed([2, 1]))
    assert (tiers(ledger), ledger.ledger.stats.orphans) == ([0, 0], 2)
    ledger.apply(stored([7], [], block_size=0))
    assert ledger.ledger.stats.misfits == 1  # on the device there is nothing to know it from


def test_a_block_off_loaded_twice_is_held_until_both_copies_are_gone(ledger: Follower) -> None:
    ledger.apply(stored([1], PROMPT[:4]), *[stored([1], [], medium="CPU", block_size=0)] * 2, removed([1]))
    ledger.apply(removed([1], medium="CPU"))
    assert tiers(ledger) == [0, 1]
    ledger.apply(removed([1], medium="CPU"))
    assert tiers(ledger) == [0, 0]


def test_nothing_is_left_of_any_tier_after_a_clear_or_a_reset(ledger: Follower) -> None:
    ledger.apply(stored([1, 2], PROMPT[:8]), stored([1, 2], PROMPT[:8], medium="CPU"))
    ledger.ledger.clear()
    assert tiers(ledger) == [0, 0]
    ledger.apply(stored([1, 2], PROMPT[:8]))
    assert tiers(ledger) == [2, 2]
    ledger.ledger.reset()
    assert tiers(ledger) == [0]
    assert ledger.index.contents(f"{POD}~device") == {}


def test_blocks_that_events_report_as_removed_no_longer_count_as_sent() -> None:
    history = RoutingHistory()
    follower = Follower(TokenBlockProcessor(4), history)
    chain = list(follower.blocks.chain(PROMPT[:16]))
    history.record_sent(POD, MODEL, chain)
    follower.apply(stored([1, 2], PROMPT[:8]), removed([2]))
    assert history.match(POD, MODEL, chain) == 1
    history.record_sent(POD, MODEL, chain)
    follower.apply(CLEARED)
    assert POD not in history
    history.record_sent(POD, MODEL, chain)
    follower.ledger.clear()  # frames were lost: what was sent may still be there
    assert POD in history
    follower.ledger.reset()
    assert POD not in history
