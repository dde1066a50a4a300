"""A batch in slices changes a ledger as the whole batch does, whatever is in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents import slices as slices_module
from matrixinfer.kvevents.limits import UNLINKED
from matrixinfer.kvevents.wire import decode

from .support import Follower, frame, removed, stored
from .test_ledger_model import Forest, Step, events_of, lives
from .test_reuse_model import ENGINES, GroupedEngine, PagedEngine, predicted


class Pair:
    """Two ledgers with the same events: one gets every batch in slices, the other as a whole."""

    def __init__(self, block_size: int) -> None:
        blocks = TokenBlockProcessor(block_size)
        self.sliced, self.whole = Follower(blocks, strict=False), Follower(blocks, strict=False)

    def apply(self, *events: dict[str, Any]) -> int:
        """Apply one batch to both. Returns in how many slices."""
        batch = decode(frame(*events)).events
        self.whole.ledger.apply(*batch)
        count = sum(1 for _ in self.sliced.ledger.applying(batch))
        assert state(self.sliced) == state(self.whole)
        return count


def state(follower: Follower) -> dict[str, Any]:
    """All that one ledger knows."""
    ledger = follower.ledger
    return {
        "index": follower.index.contents(),
        "blocks": len(ledger),
        "copies": [(forest.tier, forest.copies) for forest in ledger.forests if len(forest)],
        "stats": ledger.stats,
        "limits": ledger.limits,
        "sizes": (ledger.block_size, ledger.has_tails, ledger.drop_unit),
    }


@pytest.fixture(autouse=True)
def short_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices_module, "PIECE_BLOCKS", 2)
        patch.setattr(slices_module, "WHOLE_BLOCKS", 2)
        yield


@given(life=lives(), block_size=st.sampled_from([1, 2, 3, 4]), size=st.integers(1, 6))
def test_any_events_of_one_group(life: tuple[Forest, list[Step]], block_size: int, size: int) -> None:
    forest, steps = life
    pair = Pair(block_size)
    for at in range(0, len(steps), size):
        pair.apply(*(event for step in steps[at : at + size] for event in events_of(forest, step)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*ENGINES, "pages", "pairs"])
def test_events_of_attention_groups_and_of_pages(name: str, seed: int) -> None:
    engine = GroupedEngine(seed, *ENGINES[name]) if name in ENGINES else PagedEngine(seed, 2, pairs=name == "pairs")
    pair, slices = Pair([1, 3, 4][seed]), 0
    engine.prepare(pair.sliced)
    engine.prepare(pair.whole)
    for number in range(15):
        first = engine.batch(is_first=not number)
        slices += pair.apply(*first, *(engine.batch(is_first=False) if number else ()))
        salt, tokens = engine.prompts.prompt()
        if tokens:
            hits = [predicted(each, salt, tokens, engine.unit) for each in (pair.sliced, pair.whole)]
            assert hits[0] == hits[1]
    assert slices > 15


def test_blocks_stored_again_from_the_root_before_new_ones_are_copies() -> None:
    pair = Pair(1)
    pair.apply(stored([1, 2, 3], [1, 2, 3]))
    assert pair.apply(stored([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])) > 2
    assert pair.sliced.ledger.stats.copies == 3
    pair.apply(removed([5, 4, 3, 2, 1]))
    assert pair.sliced.held([1, 2, 3]) == 3


def test_groups_are_compared_when_the_batch_is_over() -> None:
    pair = Pair(1)
    window: dict[str, Any] = {
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 3,
        "block_size": 1,
    }
    full: dict[str, Any] = {"kv_cache_spec_kind": "full_attention", "block_size": 1}
    for at in range(1, 40, 4):
        names = list(range(at, at + 4))
        parent = at - 1 or None
        pair.apply(
            stored(names, names, parent=parent, group_idx=0, **window),
            stored(names, names, parent=parent, group_idx=1, **full),
        )
        assert UNLINKED not in pair.sliced.ledger.limits
