from collections.abc import Sequence

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents import ledger as ledger_module
from matrixinfer.kvevents.counts import UntrustedEvents

from .support import CLEARED, Follower, removed, stored

PROMPT = list(range(48))


@pytest.fixture
def same() -> Follower:
    """Token blocks as large as the engine's: four tokens."""
    return Follower(TokenBlockProcessor(4))


@pytest.fixture
def larger() -> Follower:
    """Token blocks of eight tokens over engine blocks of four."""
    return Follower(TokenBlockProcessor(8))


def test_a_stored_chain_is_held_under_its_token_hashes(same: Follower) -> None:
    same.apply(stored([11, 12, 13], PROMPT[:12]))
    assert same.held(PROMPT) == 12
    assert same.ledger.block_size == 4
    assert len(same.ledger) == same.ledger.stats.stored == 3


def test_a_removed_copy_is_not_a_removed_block(same: Follower) -> None:
    same.apply(stored([11, 12], PROMPT[:8]), stored([12], PROMPT[4:8], parent=11))
    assert same.ledger.stats.copies == 1
    same.apply(removed([12]))
    assert same.held(PROMPT) == 8
    same.apply(removed([12]))
    assert same.held(PROMPT) == 4


def test_copies_inside_a_longer_event_are_counted_and_the_rest_is_taken(same: Follower) -> None:
    same.apply(stored([11, 12], PROMPT[:8]), stored([11, 12, 13, 14], PROMPT[:16]))
    assert same.held(PROMPT) == 16
    same.apply(removed([12, 11]))
    assert same.held(PROMPT) == 16
    assert same.ledger.stats.copies == 2


def test_hits_reported_as_stored_are_not_copies(same: Follower) -> None:
    same.apply(stored([11, 12, 13], PROMPT[:12]), *[stored([11, 12], PROMPT[:8])] * 3)
    assert (same.ledger.stats.copies, same.ledger.stats.reported_again) == (0, 6)
    same.apply(removed([13, 12]))
    assert same.held(PROMPT) == 4


def test_one_block_of_the_root_and_off_loaded_ones_stored_twice_are_copies(same: Follower) -> None:
    same.apply(*[stored([11], PROMPT[:4])] * 2, *[stored([11, 12], PROMPT[:8], medium="CPU")] * 2)
    same.apply(removed([11]), removed([12, 11], medium="CPU"))
    assert (same.held(PROMPT), same.ledger.stats.copies) == (8, 3)


def test_one_event_may_store_a_block_twice(same: Follower) -> None:
    same.apply(stored([11, 12, 12], PROMPT[:8] + PROMPT[4:8]))
    same.apply(removed([12]))
    assert same.held(PROMPT) == 8


def test_two_engine_blocks_that_share_a_token_block_both_support_it() -> None:
    follower = Follower(TokenBlockProcessor(4))
    first, second = [1, 2, 3, 4, 5, 5, 5, 5], [1, 2, 3, 4, 6, 6, 6, 6]
    follower.apply(stored([11], first), stored([12], second))
    assert (follower.held(first), follower.held(second), follower.total) == (8, 8, 3)
    follower.apply(removed([11]))
    assert (follower.held(first), follower.held(second)) == (4, 8)
    follower.apply(removed([12]))
    assert follower.total == 0


def test_token_blocks_smaller_than_the_engines_come_several_at_a_time() -> None:
    follower = Follower(TokenBlockProcessor(2))
    follower.apply(stored([11, 12], PROMPT[:8]))
    assert follower.held(PROMPT) == 8
    follower.apply(removed([12]))
    assert follower.held(PROMPT) == 4


def test_token_blocks_larger_than_the_engines_wait_for_their_last_one(larger: Follower) -> None:
    larger.apply(stored([11], PROMPT[:4]))
    assert larger.held(PROMPT) == 0
    larger.apply(stored([12, 13], PROMPT[4:12], parent=11))
    assert larger.held(PROMPT) == 8


def test_token_blocks_cut_across_engine_blocks() -> None:
    follower = Follower(TokenBlockProcessor(3))
    follower.apply(stored([11, 12], PROMPT[:8]))
    assert follower.held(PROMPT) == 6
    follower.apply(stored([13], PROMPT[8:12], parent=12))
    assert follower.held(PROMPT) == 12
    follower.apply(removed([13]))
    assert follower.held(PROMPT) == 6


@pytest.mark.parametrize("block_size", [1, 3, 4, 5, 8, 16])
def test_a_chain_that_comes_in_several_events_is_one_chain(block_size: int) -> None:
    follower = Follower(TokenBlockProcessor(block_size))
    follower.apply(stored([11, 12], PROMPT[:8]))
    follower.apply(stored([13, 14, 15], PROMPT[8:20], parent=12), stored([16], PROMPT[20:24], parent=15))
    assert follower.held(PROMPT) == 24 // block_size * block_size


def test_decoded_blocks_come_one_by_one(larger: Follower) -> None:
    held = []
    for block in range(12):
        tokens = PROMPT[block * 4 : block * 4 + 4]
        larger.apply(stored([100 + block], tokens, parent=99 + block if block else None))
        held.append(larger.held(PROMPT))
    assert held == [0, 8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 48]


def test_branches_share_what_they_have_in_common(larger: Follower) -> None:
    other = PROMPT[:12] + [900] * 12
    larger.apply(stored([11, 12, 13, 14], PROMPT[:16]), stored([23, 24, 25], other[12:24], parent=13))
    assert (larger.held(PROMPT[:16]), larger.held(other)) == (16, 24)
    larger.apply(removed([14]))
    assert (larger.held(PROMPT[:16]), larger.held(other)) == (8, 24)


def test_what_follows_an_unknown_parent_is_dropped(same: Follower) -> None:
    same.apply(stored([12, 13], PROMPT[4:12], parent=11))
    assert (same.total, len(same.ledger), same.ledger.stats.orphans) == (0, 0, 2)
    same.apply(stored([14], PROMPT[12:16], parent=13))
    assert same.ledger.stats.orphans == 3


def test_removing_an_unknown_block_is_counted_and_changes_nothing(same: Follower) -> None:
    same.apply(removed([99]), stored([11], PROMPT[:4]), removed([99, 98]))
    assert (same.held(PROMPT), same.ledger.stats.unknown_removed, same.ledger.stats.removed) == (4, 3, 0)


def test_nothing_is_reached_beyond_a_removed_parent_until_it_is_stored_again(same: Follower) -> None:
    same.apply(stored([11, 12, 13, 14], PROMPT[:16]), removed([12]))
    assert (same.held(PROMPT), same.total, len(same.ledger)) == (4, 1, 3)
    same.apply(removed([14]), stored([12], PROMPT[4:8], parent=11))
    assert (same.held(PROMPT), same.total) == (12, 3)


def test_blocks_stored_below_a_hole_are_held_once_it_is_filled(same: Follower) -> None:
    same.apply(stored([11, 12, 13], PROMPT[:12]), removed([11]), stored([14], PROMPT[12:16], parent=13))
    assert same.total == 0
    same.apply(stored([11], PROMPT[:4]))
    assert same.held(PROMPT) == 16
    same.apply(removed([14]))
    assert same.held(PROMPT) == 12


def test_a_chain_may_go_on_in_engine_blocks_of_another_size(same: Follower) -> None:
    same.apply(stored([11, 12], PROMPT[:8]), stored([13, 14], PROMPT[8:20], parent=12))
    assert (same.held(PROMPT), same.ledger.block_size) == (20, 6)
    same.apply(removed([14]))
    assert same.held(PROMPT) == 12


def test_removals_in_any_order_within_one_event_leave_the_prefix(larger: Follower) -> None:
    larger.apply(stored([11, 12, 13, 14, 15, 16], PROMPT[:24]), removed([14, 16, 13, 15]))
    assert (larger.held(PROMPT), larger.total) == (8, 1)


def test_cleared_blocks_are_gone_with_their_copies(same: Follower) -> None:
    same.apply(stored([11, 12], PROMPT[:8]), stored([12], PROMPT[4:8], parent=11), CLEARED)
    assert (same.total, len(same.ledger), same.ledger.stats.clears) == (0, 0, 1)
    same.apply(stored([11, 12], PROMPT[:8]), removed([12]))
    assert same.held(PROMPT) == 4


def test_hashes_of_32_bytes_are_followed_like_integers(same: Follower) -> None:
    first, second = b"\x01" * 32, b"\x02" * 32
    same.apply(stored([first], PROMPT[:4]), stored([second], PROMPT[4:8], parent=first))
    assert same.held(PROMPT) == 8
    same.apply(removed([second]))
    assert same.held(PROMPT) == 4


# What blocks depend on besides their tokens


def test_a_salt_keeps_a_prompt_to_itself(same: Follower) -> None:
    same.apply(stored([11, 12], PROMPT[:8], extra_keys=[["tenant"], None]))
    assert (same.held(PROMPT, salt="tenant"), same.held(PROMPT, salt="other"), same.held(PROMPT)) == (8, 0, 0)


def test_an_adapter_is_a_model_of_its_own(same: Follower) -> None:
    keys = [["poet"], ["poet"]]
    same.apply(stored([11, 12], PROMPT[:8], lora_id=1, lora_name="poet", extra_keys=keys))
    same.apply(stored([13], PROMPT[8:12], parent=12, lora_id=1, lora_name="poet", extra_keys=keys[:1]))
    assert (same.held(PROMPT, model="poet"), same.held(PROMPT)) == (12, 0)
    same.apply(removed([13, 12]))
    assert same.held(PROMPT, model="poet") == 4


def test_an_adapter_and_a_salt_go_together(same: Follower) -> None:
    same.apply(stored([11, 12], PROMPT[:8], lora_id=1, lora_name="poet", extra_keys=[["poet", "tenant"], ["poet"]]))
    assert same.held(PROMPT, model="poet", salt="tenant") == 8
    assert same.held(PROMPT, model="poet") == 0


def test_an_adapter_without_extra_keys_is_recognised_by_its_name(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4], lora_id=1, lora_name="poet", extra_keys=None))
    assert (same.held(PROMPT, model="poet"), same.held(PROMPT)) == (4, 0)


def test_an_adapter_without_a_name_is_not_indexed(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4], lora_id=1), stored([12], PROMPT[4:8], parent=11, lora_id=1))
    assert (same.total, same.ledger.stats.ended) == (0, 2)


@pytest.mark.parametrize(
    "keys", [[["image", 4]], ["salt", "digest"], [["image", 3], 7], [["image", 1.5]], [b"embedding"], [7], "text", 7]
)
def test_any_other_extra_key_ends_the_chain_at_the_root(same: Follower, keys: object) -> None:
    same.apply(stored([11, 12], PROMPT[:8], extra_keys=[keys, None]))
    assert (same.total, same.ledger.stats.ended) == (0, 2)


@pytest.mark.parametrize("keys", [[["image", 4]], ["a string beyond the root is no salt"]])
def test_an_extra_key_further_on_ends_the_chain_there(same: Follower, keys: object) -> None:
    same.apply(stored([11, 12, 13], PROMPT[:12], extra_keys=[None, keys, None]))
    same.apply(stored([14], PROMPT[12:16], parent=13), stored([15], PROMPT[4:8], parent=11, extra_keys=[keys]))
    assert (same.held(PROMPT), same.total) == (4, 1)
    assert (same.ledger.stats.ended, same.ledger.stats.orphans, len(same.ledger)) == (4, 0, 5)


MEDIA_KEYS = [None, [["cat", 2]], [["cat", -2], ["dog", 3]], [["dog", -1]]]
MEDIA = [(6, "cat"), (11, "dog")]


def test_media_are_part_of_what_a_block_depends_on(same: Follower) -> None:
    same.apply(stored([11, 12, 13, 14], PROMPT[:16], extra_keys=MEDIA_KEYS))
    assert same.held(PROMPT, media=MEDIA) == 16
    assert same.held(PROMPT) == 4
    assert same.held(PROMPT, media=[(6, "cat"), (11, "cow")]) == 8
    assert same.held(PROMPT, media=[(5, "cat"), (11, "dog")]) == 4
    assert same.held(PROMPT, media=MEDIA[:1]) == 8


def test_media_salts_and_adapters_go_together(same: Follower) -> None:
    keys = [["poet", ["cat", 1], "tenant"], ["poet", ["cat", -3], ["dog", 0]]]
    same.apply(stored([11, 12], PROMPT[:8], lora_id=1, lora_name="poet", extra_keys=keys))
    media = [(1, "cat"), (4, "dog")]
    assert same.held(PROMPT, model="poet", salt="tenant", media=media) == 8
    assert same.held(PROMPT, model="poet", media=media) == 0
    assert same.held(PROMPT, model="poet", salt="tenant") == 0
    assert same.held(PROMPT, salt="tenant", media=media) == 0


@pytest.mark.parametrize("size", [1, 3, 4])
def test_media_count_where_they_begin_whatever_the_size_of_token_blocks(size: int) -> None:
    follower = Follower(TokenBlockProcessor(size))
    follower.apply(stored([11, 12], PROMPT[:8], extra_keys=MEDIA_KEYS[:2]))
    follower.apply(stored([13, 14], PROMPT[8:16], parent=12, extra_keys=MEDIA_KEYS[2:]))
    assert follower.hit(PROMPT, 4, media=MEDIA) == 16
    assert follower.hit(PROMPT, 4, media=[(7, "cat"), (11, "dog")]) == 4
    follower.apply(removed([14, 13]), stored([15], PROMPT[8:12], parent=12, extra_keys=[[["cat", -2]]]))
    assert follower.hit(PROMPT, 4, media=MEDIA) == 8
    assert follower.hit(PROMPT, 4, media=MEDIA[:1]) == 12


def test_media_in_off_loaded_blocks_count(same: Follower) -> None:
    same.apply(stored([11, 12, 13], PROMPT[:12], extra_keys=MEDIA_KEYS[:3]))
    same.apply(stored([11, 12, 13], [], medium="CPU", block_size=0), removed([13, 12, 11]))
    assert (same.held(PROMPT, media=MEDIA), same.held(PROMPT)) == (12, 4)


def test_blocks_that_are_not_indexed_are_counted_and_removed_like_others(same: Follower) -> None:
    image = stored([11], PROMPT[:4], extra_keys=[[["image", 3]]])
    same.apply(image, image, removed([11]))
    assert len(same.ledger) == 1
    same.apply(removed([11]), stored([12], PROMPT[4:8], parent=11))
    assert (len(same.ledger), same.ledger.stats.orphans, same.ledger.stats.unknown_removed) == (0, 1, 0)


# Media and groups


def test_groups_of_unknown_attention_are_left_out_and_named(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4], kv_cache_spec_kind="full_attention", group_idx=0))
    same.apply(stored([11], PROMPT[:4], kv_cache_spec_kind="dreams", group_idx=1), removed([11], group_idx=1))
    assert (same.held(PROMPT), same.ledger.stats.other_attention) == (4, 1)
    assert "dreams" in same.ledger.limits[0]


def test_a_block_is_held_while_any_medium_holds_it(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4]), stored([11], PROMPT[:4], medium="CPU"))
    assert same.ledger.stats.copies == 0
    same.apply(removed([11]))
    assert same.held(PROMPT) == 4
    same.apply(removed([11], medium="CPU"))
    assert same.total == 0


def test_an_event_without_medium_or_group_means_the_gpu_and_the_first(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4], medium=None, group_idx=None), removed([11], medium="GPU", group_idx=0))
    assert (same.total, same.ledger.stats.removed) == (0, 1)


def test_a_chain_does_not_go_on_in_another_medium(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4]), stored([12], PROMPT[4:8], parent=11, medium="CPU"))
    assert (same.held(PROMPT), same.ledger.stats.orphans) == (4, 1)


def test_media_and_groups_beyond_any_real_engines_are_refused(same: Follower) -> None:
    same.apply(*(stored([11], PROMPT[:4], medium=f"DISK{number}") for number in range(100)))
    assert (len(same.ledger.forests), same.ledger.stats.misfits) == (16, 84)
    same.ledger.reset()
    same.apply(
        *(stored([11], PROMPT[:4], group_idx=group, kv_cache_spec_kind="full_attention") for group in range(100))
    )
    assert (len(same.ledger.rules.specs), same.ledger.stats.misfits) == (16, 168)


@pytest.mark.parametrize(
    "event",
    [
        stored([11], [], block_size=0),
        stored([11], [], block_size=4),
        stored([11], PROMPT[:3], block_size=4),
        stored([11], PROMPT[:8], block_size=4),
        stored([], [], block_size=4),
        stored([11], PROMPT[:4], block_size=-4),
        stored([11], [1, 2, 3, -4]),
        stored([11], [1, 2, 3, 2**32]),
    ],
)
def test_events_whose_tokens_do_not_fit_are_counted_and_skipped(same: Follower, event: dict[str, object]) -> None:
    same.apply(event, stored([12], PROMPT[:4]))
    assert (same.held(PROMPT), same.total, same.ledger.stats.misfits) == (4, 1, 1)


# Schemes


def test_blocks_hashed_alone_are_held_wherever_they_stand() -> None:
    follower = Follower(TokenBlockProcessor(4, "block"))
    repeated = [7, 7, 7, 7]
    follower.apply(stored([11, 12, 13], repeated * 2 + PROMPT[:4]))
    assert follower.total == 2
    follower.apply(removed([13, 12]))
    assert (follower.held(repeated), follower.total) == (4, 1)
    follower.apply(removed([11]))
    assert follower.total == 0


def test_salted_blocks_are_not_indexed_when_hashed_alone() -> None:
    follower = Follower(TokenBlockProcessor(4, "block"))
    follower.apply(stored([11, 12], PROMPT[:8], extra_keys=[["tenant"], None]))
    assert (follower.total, follower.ledger.stats.ended) == (0, 2)


def test_clearing_the_ledger_touches_no_other_pod(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4]))
    same.index.add("llama", "pod-b", list(same.blocks.chain(PROMPT)), None)
    same.ledger.clear()
    assert same.index.contents() == {}
    assert same.index.count("llama", same.blocks.chain(PROMPT)) == {"pod-b": 12}


def test_an_eviction_may_name_a_chain_from_its_root(same: Follower) -> None:
    same.apply(stored([11, 12, 13], PROMPT[:12]), removed([11, 12, 13]))
    assert same.total == len(same.ledger) == 0
    assert same.ledger.stats.removed == 3


def test_evictions_of_different_places_in_a_row_are_distinguished(same: Follower) -> None:
    for medium in ("GPU", "CPU"):
        same.apply(stored([11, 12], PROMPT[:8], medium=medium))
    same.apply(removed([12], medium="GPU"), removed([12], medium="CPU"), removed([11], medium="CPU"))
    assert same.held(PROMPT) == 4


def as_array(hashes: list[int], tokens: Sequence[object], parent: int | None, *more: object) -> list[object]:
    """An event as SGLang writes it: one block, and no extra keys."""
    return ["BlockStored", hashes, parent, tokens, 4, None, *more]


def test_a_layout_without_extra_keys_hides_salts(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4]))
    assert not same.ledger.hides_salts
    same.apply(as_array([12], PROMPT[4:8], 11, "GPU", None))
    assert (same.ledger.hides_salts, same.ledger.hides_adapters) == (True, False)
    same.apply(as_array([-13], PROMPT[8:12], 12, "GPU"))
    assert same.ledger.hides_adapters
    assert same.held(PROMPT) == 12


def test_pages_named_by_their_tokens_alone_are_not_believed(same: Follower) -> None:
    with pytest.raises(UntrustedEvents, match="without what precedes"):
        same.apply(as_array([hash(tuple(PROMPT[:4]))], PROMPT[:4], None))


def test_pairs_of_tokens_are_their_first_ones_and_the_token_after_them(same: Follower) -> None:
    pairs = [(a, a + 1) for a in PROMPT[:4]]
    same.apply(as_array([11], pairs, None, "GPU"))
    assert (same.held(PROMPT), same.ledger.rules.lookahead) == (4, 1)


def test_attention_groups_of_unknown_kind_are_not_believed(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4], group_idx=0))
    with pytest.raises(UntrustedEvents, match="attention groups"):
        same.apply(stored([12], PROMPT[:4], group_idx=1))


def test_matches_are_floored_to_the_largest_block_of_the_device_and_not_to_chunks_elsewhere(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:8], medium="CPU"))
    assert same.ledger.block_size == 8
    same.apply(stored([12], PROMPT[:4]), stored([13], PROMPT[:12], medium="CPU"))
    assert same.ledger.block_size == 4
    same.ledger.reset()
    assert same.ledger.block_size is None


def test_an_engine_that_numbers_its_adapters_does_not_hide_them(same: Follower) -> None:
    numbered = ["BlockStored", [12], None, PROMPT[4:8], 4, 1, "GPU"]
    same.apply(numbered, as_array([11], PROMPT[:4], None, "GPU"))
    assert not same.ledger.hides_adapters
    same.ledger.reset()
    assert not same.ledger.hides_salts


def test_what_an_adapter_left_behind_is_given_back(same: Follower) -> None:
    same.apply(stored([11], PROMPT[:4], lora_name="poet", lora_id=1), removed([11]))
    assert not same.ledger.supports.models


@pytest.mark.parametrize("parent", [None, 11])
def test_a_hash_that_follows_two_prefixes_is_not_believed(same: Follower, parent: int | None) -> None:
    same.apply(as_array([11], PROMPT[:4], None), as_array([12], PROMPT[4:8], 11), as_array([13], PROMPT[8:12], 12))
    same.apply(as_array([13], PROMPT[8:12], 12))  # a copy
    with pytest.raises(UntrustedEvents, match="different prefixes"):
        same.apply(as_array([13], PROMPT[8:12], parent))


def test_an_engine_that_claims_more_than_any_can_hold_is_not_believed(
    same: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_TOKENS", 8)
    same.apply(stored([11, 12, 13], PROMPT[:12]))
    with pytest.raises(UntrustedEvents, match="more than 8 tokens"):
        same.apply(stored([14], PROMPT[12:16], parent=13))


def test_blocks_of_another_group_count_towards_what_an_engine_can_hold(
    same: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_TOKENS", 8)
    same.apply(stored([11], PROMPT[:4]))
    for first in (21, 31):
        same.apply(stored([first, first + 1], [], block_size=4, group_idx=1, kv_cache_spec_kind="mamba"))
    with pytest.raises(UntrustedEvents, match="more than 8 tokens"):
        same.apply(stored([12], PROMPT[4:8], parent=11))


def test_where_an_engine_block_straddles_token_blocks_its_tail_decides() -> None:
    follower = Follower(TokenBlockProcessor(6))
    follower.apply(stored([11, 12], PROMPT[:8]))
    # [0, 4) and [4, 8) are held; the token block [0, 6) needs both, so more than its own tokens.
    assert follower.hit(PROMPT[:12], 4) == 8
    assert follower.hit([*PROMPT[:6], 99, 99, 99], 4) == 4
    assert follower.hit(PROMPT[:7], 4) == 4
    follower.apply(removed([12]))
    assert follower.total == 0
