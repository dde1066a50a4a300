"""What a ledger says its events cannot tell."""

from __future__ import annotations

from typing import Any

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents import event_reader, limits
from matrixinfer.kvevents.limits import Limits
from matrixinfer.kvevents.tiers import MOST_UNEVICTED_TOKENS, Unevicted

from .support import CLEARED, Follower, removed, stored

PROMPT = list(range(32))
FULL: dict[str, Any] = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
CHUNKED: dict[str, Any] = {"group_idx": 1, "kv_cache_spec_kind": "chunked_local_attention"}
SLIDING: dict[str, Any] = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 8}
MAMBA: dict[str, Any] = {"group_idx": 1, "kv_cache_spec_kind": "mamba"}


@pytest.fixture
def engine() -> Follower:
    return Follower(TokenBlockProcessor(4))


def limits_of(follower: Follower) -> tuple[str, ...]:
    return follower.ledger.limits


def test_an_engine_with_full_attention_alone_has_no_limits(engine: Follower) -> None:
    engine.apply(stored([1, 2], PROMPT[:8], **FULL), stored([2], PROMPT[4:8], parent=1), removed([2]), CLEARED)
    assert limits_of(engine) == ()


def test_a_chunk_size_that_is_not_known_is_a_limit(engine: Follower) -> None:
    engine.apply(stored([1], PROMPT[:4], **FULL), stored([1], PROMPT[:4], **CHUNKED))
    assert limits_of(engine) == (limits.CHUNKED,)
    known = Follower(TokenBlockProcessor(4))
    known.ledger.rules.chunks(1, 8)
    known.apply(stored([1], PROMPT[:4], **FULL), stored([1], PROMPT[:4], **CHUNKED))
    assert limits_of(known) == ()


def test_sliding_windows_alone_are_a_limit_where_they_are_published_sparsely(engine: Follower) -> None:
    engine.apply(stored([1], PROMPT[:4], **SLIDING))
    assert limits_of(engine) == ()
    engine.apply(stored([3], PROMPT[4:12], parent=1, block_size=4, **SLIDING))
    assert limits_of(engine) == (limits.SPARSE_WINDOWS,)
    engine.apply(stored([1, 2, 3], PROMPT[:12], **{**FULL, "group_idx": 1}))
    assert limits_of(engine) == ()


def test_mamba_states_within_a_block_are_a_limit(engine: Follower) -> None:
    engine.apply(stored([1, 2], PROMPT[:16], block_size=8, **FULL), stored([2], [], block_size=8, **MAMBA))
    assert limits_of(engine) == ()
    engine.apply(stored([3], PROMPT[16:20], parent=2, block_size=4, **MAMBA))
    assert limits_of(engine) == (limits.FINE_STATES,)


def test_a_group_whose_blocks_are_nowhere_else_is_a_limit_until_they_are(engine: Follower) -> None:
    engine.apply(stored([1, 2], PROMPT[:8], **FULL), stored([7], [], block_size=4, **MAMBA))
    assert limits_of(engine) == (limits.UNLINKED,)
    engine.apply(stored([2], [], block_size=4, **MAMBA))
    assert limits_of(engine) == ()
    engine.apply(stored([8], [], block_size=4, **MAMBA))
    assert limits_of(engine) == ()  # its full block may have been evicted first


def test_limits_are_in_the_order_in_which_they_showed_and_some_pass(engine: Follower) -> None:
    engine.apply(
        stored([1], PROMPT[:3], block_size=4),
        stored([5], PROMPT[:4], group_idx=1, kv_cache_spec_kind="dreams"),
        stored([2], PROMPT[:4], medium="CPU"),
        *(stored([10 + number], PROMPT[:4], parent=9) for number in range(20)),
    )
    lasting = limits.unknown_kind("dreams"), limits.store_only("CPU")
    assert limits_of(engine) == (limits.MISFITS, *lasting, limits.ORPHANS)
    engine.ledger.clear()
    assert limits_of(engine) == lasting
    engine.apply(stored([10], PROMPT[:4], parent=9))
    assert limits_of(engine) == lasting
    engine.ledger.reset()
    assert limits_of(engine) == ()


def test_a_few_blocks_without_parents_are_no_limit(engine: Follower) -> None:
    for number in range(0, 4_000, 2):
        engine.apply(stored([number + 1, number + 2], [number, 1, 2, 3, 4, 5, 6, 7]))
    engine.apply(*(stored([10_000 + number], PROMPT[:4], parent=9_999) for number in range(40)))
    assert limits_of(engine) == ()


def test_a_reset_and_a_silent_tier_are_limits_that_name_the_tier(engine: Follower) -> None:
    engine.apply(stored([1], PROMPT[:4]), stored([1], [], medium="CPU", block_size=0))
    assert limits_of(engine) == ()
    engine.apply(CLEARED)
    assert limits_of(engine) == (limits.spared("CPU"),)
    assert engine.held(PROMPT) == 4
    engine.apply(removed([1], medium="CPU"), stored([1], PROMPT[:4], medium="DISK"))
    assert limits_of(engine) == (limits.spared("CPU"), limits.store_only("DISK"))
    engine.apply(removed([1], medium="DISK"))
    assert limits_of(engine) == (limits.spared("CPU"),)


def test_slower_tiers_beside_attention_groups_are_a_limit(engine: Follower) -> None:
    engine.apply(stored([1], PROMPT[:4], **FULL), stored([1], PROMPT[:4], **MAMBA))
    assert limits_of(engine) == ()
    engine.apply(stored([1], [], medium="CPU", block_size=0))
    assert limits_of(engine) == (limits.SLOWER_TIERS,)


def test_a_connector_that_publishes_first_does_not_pass_for_a_radix_tree(engine: Follower) -> None:
    page = {"type": "BlockStored", "block_hashes": [1], "token_ids": PROMPT[:4], "block_size": 4}
    engine.apply({**page, "medium": "DISK"}, stored([2], PROMPT[:4]), stored([2], PROMPT[:4]), removed([2]))
    assert engine.held(PROMPT) == 4  # a copy is left
    engine.apply({**page, "medium": "DISK"}, removed([2]))
    assert engine.held(PROMPT) == 4
    engine.apply(removed([1], medium="DISK"))
    assert engine.held(PROMPT) == 0


def test_pages_that_tenants_share_are_a_limit_once_one_goes(engine: Follower) -> None:
    page = {"type": "BlockStored", "block_hashes": [1], "token_ids": PROMPT[:4], "block_size": 4, "medium": "GPU"}
    engine.apply(page, {**page, "cache_salt": "s"})
    assert limits_of(engine) == ()
    engine.apply(removed([1]))
    assert limits_of(engine) == (limits.SHARED_PAGES,)
    engine.apply(CLEARED)
    assert (limits_of(engine), engine.held(PROMPT)) == ((), 0)


def test_there_is_a_most_of_limits() -> None:
    record = Limits()
    for number in range(1_000):
        record.note(limits.unknown_kind(f"{number}" * 1_000))
    assert len(record.words) == 16
    assert max(map(len, record.words)) < 250


# Tiers that publish no evictions


def test_the_oldest_blocks_of_a_silent_tier_are_forgotten() -> None:
    tier = Unevicted(most_tokens=160)
    assert tier.stored("cpu", range(40), 4) == []
    assert tier.stored("cpu", [0], 4) == []  # stored again: it is the newest
    assert tier.stored("cpu", [40], 4) == [1, 2, 3, 4]
    assert tier.stored("disk", range(40), 4) == []
    assert tier.evicts("cpu")
    assert not tier.evicts("cpu")
    assert tier.stored("cpu", range(1_000), 4) == []
    tier.reset()
    assert tier.stored("cpu", range(41), 4) == [0, 1, 2, 3]
    assert MOST_UNEVICTED_TOKENS >= 1_000_000


def test_a_silent_tier_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_reader, "Unevicted", lambda: Unevicted(most_tokens=64))
    engine = Follower(TokenBlockProcessor(4))
    for number in range(100):
        tokens = [number, *range(7)]
        engine.apply(stored([2 * number + 1, 2 * number + 2], tokens, medium="cpu"))
    assert 14 <= len(engine.ledger) <= 16
    assert engine.held([99, *range(7)]) == 8
    assert engine.held([1, *range(7)]) == 0


def test_chunks_of_a_connector_with_one_token_too_many_are_cut(engine: Follower) -> None:
    engine.apply(stored([1, 2], PROMPT[:8]))
    engine.apply(stored([5], PROMPT[:9], block_size=8, medium="cpu"), removed([2, 1]))
    assert (engine.held(PROMPT), engine.ledger.block_size) == (8, 4)
    engine.apply(stored([6], PROMPT[8:18], block_size=8, parent=5, medium="cpu"))
    assert (engine.held(PROMPT), engine.ledger.stats.misfits) == (8, 1)


def test_a_removal_is_put_after_the_off_loading_of_the_same_batch_but_not_across_a_clear(engine: Follower) -> None:
    bare = stored([1, 2], [], medium="CPU", block_size=0)
    engine.apply(stored([1, 2, 3], PROMPT[:12]), removed([3, 2, 1]), bare)
    assert engine.held(PROMPT) == 8
    engine.apply(stored([1, 2, 3], PROMPT[:12]), removed([2]), CLEARED, stored([1, 2], PROMPT[:8]), bare)
    engine.apply(removed([2, 1], medium="CPU"), removed([2, 1], medium="CPU"))
    assert engine.held(PROMPT) == 8
    engine.apply(removed([2, 1]))
    assert engine.total == 0


def page(block: int, tokens: list[int], **fields: Any) -> dict[str, Any]:
    """A page as SGLang stores it."""
    event = stored([block], tokens, **fields)
    return {name: value for name, value in event.items() if name not in ("extra_keys", "lora_name")}


def test_a_page_that_is_stored_again_shows_an_extra_key_of_a_client(engine: Follower) -> None:
    engine.apply(page(1, PROMPT[:4]), page(1, PROMPT[:4], cache_salt="tenant"), removed([1]), page(1, PROMPT[:4]))
    assert limits.EXTRA_KEYS not in limits_of(engine)
    engine.apply(page(1, PROMPT[:4]))
    assert limits.EXTRA_KEYS in limits_of(engine)
    engine.apply(CLEARED)
    assert limits_of(engine) == (limits.EXTRA_KEYS,)


def test_arrays_with_a_map_at_their_end_show_salts_and_adapters(engine: Follower) -> None:
    def array(block: int, tokens: list[int], *said: object) -> list[object]:
        return ["BlockStored", [block], None, tokens, len(tokens), None, "GPU", *said]

    engine.apply(array(1, PROMPT[:4]), array(2, PROMPT[4:8]))
    assert (engine.ledger.hides_salts, engine.ledger.hides_adapters) == (True, True)
    engine.apply(array(1, PROMPT[:4], {"cache_salt": "tenant"}))
    assert (engine.ledger.hides_salts, engine.ledger.hides_adapters, engine.ledger.is_exact) == (False, False, True)
    engine.apply(array(3, PROMPT[8:12], {"lora_name": "ad"}), array(4, PROMPT[12:16]))
    held = [engine.held(PROMPT[at : at + 4]) for at in (0, 4, 8, 12)]
    assert (held, engine.held(PROMPT[:4], salt="tenant")) == ([4, 4, 0, 4], 4)
    assert engine.held(PROMPT[8:12], model="ad") == 4
    engine.apply(["BlockRemoved", [2], "GPU"])
    assert (engine.held(PROMPT[4:8]), engine.ledger.hides_salts) == (0, False)


def test_chunked_attention_alone_is_a_limit_until_full_attention_is_seen(engine: Follower) -> None:
    engine.ledger.rules.chunks(1, 8)
    engine.apply(stored([1], PROMPT[:4], **CHUNKED))
    assert limits_of(engine) == (limits.CHUNKED_ALONE,)
    engine.apply(stored([1], PROMPT[:4], **FULL))
    assert limits_of(engine) == ()


@pytest.mark.parametrize(
    ("window_block", "limit"), [(4, ()), (8, (limits.DROPPED_WINDOWS,)), (2, (limits.DROPPED_SIZES,))]
)
def test_drops_of_other_blocks_than_those_of_full_attention_are_a_limit(
    window_block: int, limit: tuple[str, ...]
) -> None:
    engine = Follower(TokenBlockProcessor(4))
    sliding = {**SLIDING, "group_idx": 1}
    count = 8 // window_block
    engine.apply(stored([1, 2], PROMPT[:8], **FULL), stored(list(range(3 - count, 3)), PROMPT[:8], **sliding))
    engine.ledger.drop_more()
    assert limits_of(engine) == ()
    engine.ledger.drop_more()
    assert limits_of(engine) == limit
    engine.ledger.drop_nothing()
    assert limits_of(engine) == ()


def test_a_drop_in_the_windows_alone_is_a_limit(engine: Follower) -> None:
    engine.apply(stored([1, 2], PROMPT[:8], **FULL), stored([1, 2], PROMPT[:8], **{**SLIDING, "group_idx": 1}))
    engine.ledger.reusable.drops([1])
    engine.apply(stored([3], PROMPT[8:12], parent=2, **FULL), stored([9], PROMPT[:4], **{**SLIDING, "group_idx": 2}))
    assert limits_of(engine)[0] == limits.DROPPED_WINDOWS


def test_few_orphans_are_a_late_beginning_and_many_are_a_loss(engine: Follower) -> None:
    engine.apply(*(stored([100 + block], PROMPT[:4], parent=99) for block in range(16)))
    assert limits_of(engine) == ()
    engine.apply(stored([200], PROMPT[:4], parent=99))
    assert limits_of(engine) == (limits.ORPHANS,)
    engine.apply(CLEARED)
    assert limits_of(engine) == ()
