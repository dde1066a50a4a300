from pathlib import Path
from typing import Any

import msgspec
import pytest

from matrixinfer.feedtools.capture import CaptureError, CaptureReport, Mismatch, PublisherReport, check_capture
from matrixinfer.feedtools.capture_file import CaptureReader
from matrixinfer.feedtools.facts import (
    COMPONENTS,
    COPIES,
    EXTRA_KEY,
    EXTRA_KEY_SHARED,
    FINE_HITS,
    RESET,
    SHARED_PAGES,
    STORE_ONLY,
)
from matrixinfer.kvevents.limits import DROPPED_WINDOWS, MISFITS, SPARSE_WINDOWS, UNLINKED
from tests.unit.kvevents.support import CLEARED, frame, removed, stored

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
ORACLES = ["oracle-bs16", "oracle-bs32", "oracle-bs128-first250"]
PROMPT = list(range(40))


def recorded(name: str) -> CaptureReader:
    return CaptureReader(CAPTURES / f"{name}.jsonl.gz")


def event(seq: int, *events: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"kind": "event", "seq": seq, "payload_hex": frame(*events).hex(), **fields}


def asked(label: str, tokens: list[int], cached: Any, **body: Any) -> list[dict[str, Any]]:
    """A request and what the engine said of it."""
    return [
        {"kind": "request", "label": label, "body": {"model": "tiny", **body}, "prompt_token_ids": tokens},
        {"kind": "response", "label": label, "usage": {"prompt_tokens_details": {"cached_tokens": cached}}},
    ]


STORED = event(0, stored([11, 12, 13, 14], PROMPT[:16]))
"""Four engine blocks of four tokens."""


def mismatches(report: CaptureReport) -> list[tuple[str, int, int]]:
    return [(mismatch.label, mismatch.predicted, mismatch.actual) for mismatch in report.mismatches]


# Recorded engines


@pytest.mark.parametrize(
    ("name", "requests"),
    [
        ("capture", 25),
        ("capture-lora", 21),
        ("capture-v028-bs16", 25),
        ("capture-as-v020", 25),
        ("capture-as-v024", 25),
        ("capture-as-mapbatch", 25),
    ],
)
def test_recorded_hits_are_predicted_but_after_the_reset_that_was_not_announced(name: str, requests: int) -> None:
    report = check_capture(recorded(name))
    assert [mismatch.label for mismatch in report.mismatches] == ["chat1-after-reset"]
    assert (report.requests, report.unsupported) == (requests, {})


@pytest.mark.parametrize("name", ["capture-as-v012", "capture-as-v016"])
def test_layouts_that_hide_salts_leave_salted_prompts_out(name: str) -> None:
    report = check_capture(recorded(name))
    assert [mismatch.label for mismatch in report.mismatches] == ["chat1-after-reset"]
    assert report.requests == 23
    assert report.unsupported == dict.fromkeys(["salt-a", "salt-a-again"], "the layout hides salts")


def test_the_ranks_of_a_recorded_engine_stay_apart() -> None:
    report = check_capture(recorded("capture-dp2"))
    counts = [(publisher.name, publisher.frames, publisher.events, publisher.blocks) for publisher in report.publishers]
    assert counts == [("5557", 3, 3, 9), ("5558", 2, 2, 6)]
    assert (report.frames, report.events, report.requests, report.unreadable) == (5, 5, 0, 0)
    assert not any(publisher.gaps or publisher.restarts or publisher.orphans for publisher in report.publishers)


@pytest.mark.parametrize(("name", "requests"), list(zip(ORACLES, [1218, 1202, 250], strict=True)))
def test_every_lookup_of_the_engines_own_cache_manager_is_predicted(name: str, requests: int) -> None:
    report = check_capture(recorded(name))
    assert (report.requests, report.mismatches) == (requests, [])


@pytest.mark.parametrize("block_size", [8, 16, 48, 64, 100, 128])
@pytest.mark.parametrize("name", ORACLES)
def test_predictions_hold_whether_or_not_token_blocks_and_engine_blocks_divide(name: str, block_size: int) -> None:
    assert check_capture(recorded(name), block_size=block_size).mismatches == []


@pytest.mark.parametrize(
    ("name", "compared", "reasons"),
    [
        ("eagle-mla-mtp-bs64-first250", 250, set()),
        ("hybrid-full-chunked-bs16-first250", 250, set()),
        ("hybrid-full32-swa16-first200", 200, set()),
        ("hybrid-mla-swamla-bs64-first250", 250, set()),
        ("media-full-bs16", 120, set()),
        ("mla-bs64-first250", 250, set()),
        ("sglang-eagle-p64", 400, set()),
        ("sglang-hicache-wb-p1-first200", 200, set()),
        ("sglang-p64", 450, set()),
        ("swa-only-dense-bs16-first200", 200, set()),
        ("v033-eagle-lookahead1-full-swa-bs16-first250", 250, set()),
        ("v033-eagle-lookahead1-full32-swa16-first100", 100, set()),
        ("v033-hybrid-full-mamba-bs64-first250", 250, set()),
        ("v033-media-lookahead1-full-swa-bs16", 120, set()),
        ("eagle-full16-swa32-first100", 1, {DROPPED_WINDOWS}),
        ("hybrid-full-mamba-unit16-bs64-first120", 0, {FINE_HITS}),
        ("sglang-extrakey-p16-first250", 136, {EXTRA_KEY, EXTRA_KEY_SHARED}),
        ("sglang-swa-p1-first150", 39, {COMPONENTS}),
        ("swa-only-bs16-first150", 2, {SPARSE_WINDOWS}),
    ],
)
def test_hits_of_every_kind_of_attention_are_predicted_or_named(name: str, compared: int, reasons: set[str]) -> None:
    report = check_capture(recorded(f"oracle-{name}"))
    assert (report.requests, report.mismatches) == (compared, [])
    assert set(report.unsupported.values()) == reasons


@pytest.mark.parametrize(
    ("name", "requests"), [("deepseek", 44), ("deepseek-mtp", 45), ("gemma3", 45), ("qwen3-next", 45)]
)
def test_hits_of_running_engines_of_other_kinds_are_predicted(name: str, requests: int) -> None:
    report = check_capture(recorded(f"capture-{name}"))
    assert (report.requests, report.mismatches) == (requests, [])
    assert set(report.unsupported.values()) <= {COPIES}


@pytest.mark.parametrize("block_size", [8, 48, 64, 128])
@pytest.mark.parametrize("name", ["deepseek", "gemma3", "qwen3-next"])
def test_hits_of_other_kinds_are_predicted_at_any_size_of_token_blocks(name: str, block_size: int) -> None:
    assert check_capture(recorded(f"capture-{name}"), block_size=block_size).mismatches == []


# The rules of comparison


def test_a_wrong_prediction_is_reported_in_tokens() -> None:
    rows = [STORED, *asked("right", PROMPT, 16), *asked("wrong", PROMPT, 12), *asked("missed", PROMPT[1:], 4)]
    report = check_capture(rows)
    assert (report.frames, report.events, report.requests) == (1, 1, 3)
    assert report.mismatches == [
        Mismatch(label="wrong", predicted=16, actual=12),
        Mismatch(label="missed", predicted=0, actual=4),
    ]


@pytest.mark.parametrize(("tokens", "largest"), [(17, 16), (16, 12), (13, 12), (12, 8), (4, 0), (1, 0)])
def test_the_last_token_is_never_a_hit(tokens: int, largest: int) -> None:
    assert check_capture([STORED, *asked("r", PROMPT[:tokens], largest)]).mismatches == []


@pytest.mark.parametrize(
    ("block_size", "actual", "expected"),
    [
        (4, 16, []),
        (2, 16, []),  # 16 tokens held, the prompt's 17th differs
        (8, 16, []),
        (16, 16, []),
        (32, 16, []),  # less than a token block is no difference
        (3, 16, []),
        (3, 11, [("r", 15, 9)]),
        (16, 12, [("r", 16, 0)]),
    ],
)
def test_both_sides_are_compared_in_blocks_that_they_share(
    block_size: int, actual: int, expected: list[tuple[str, int, int]]
) -> None:
    assert mismatches(check_capture([STORED, *asked("r", PROMPT, actual)], block_size=block_size)) == expected


def test_a_prediction_in_small_token_blocks_is_floored_to_the_engines() -> None:
    prompt = [*PROMPT[:14], 900, 901, 902]
    rows = [event(0, stored([11, 12, 13, 14], PROMPT[:16])), *asked("r", prompt, 12)]
    assert check_capture(rows, block_size=2).mismatches == []


def test_requests_that_cannot_be_compared_are_left_out() -> None:
    rows = [STORED, *asked("several", PROMPT, 0, n=2), *asked("no-tokens", [], 0), *asked("no-count", PROMPT, None)]
    rows += asked("per-prompt", PROMPT, [16, 16])
    rows += [{"kind": "request", "label": "silent", "body": {}, "prompt_token_ids": PROMPT}]
    rows += [{"kind": "response", "label": "silent", "usage": None}, {"kind": "response", "status": 400}]
    report = check_capture(rows)
    assert (report.requests, report.mismatches, report.unsupported) == (0, [], {})


def test_prompts_of_more_than_tokens_are_named_but_not_compared() -> None:
    image = [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}]}]
    text = [{"role": "user", "content": [{"type": "text", "text": "see"}]}, {"role": "user", "content": "this"}]
    rows = [STORED, *asked("image", PROMPT, 0, messages=image), *asked("embeds", PROMPT, 0, prompt_embeds="x")]
    report = check_capture([*rows, *asked("text", PROMPT, 16, messages=text)])
    assert report.unsupported == dict.fromkeys(["image", "embeds"], "more than tokens")
    assert (report.requests, report.mismatches) == (1, [])


def test_removals_clears_and_copies_count_in_their_order() -> None:
    rows = [
        STORED,
        event(1, stored([14], PROMPT[12:16], parent=13), removed([14])),
        *asked("copied", PROMPT, 16),
        event(2, removed([14])),
        *asked("removed", PROMPT, 12),
        event(3, CLEARED),
        *asked("cleared", PROMPT, 0),
    ]
    report = check_capture(rows)
    assert (report.frames, report.events, report.requests, report.mismatches) == (4, 5, 3, [])


def test_salts_and_adapters_are_prompts_of_their_own() -> None:
    models = {"data": [{"id": "tiny"}, {"id": "poet", "parent": "tiny"}]}
    rows = [
        {"kind": "meta", "models": models},
        event(0, stored([11], PROMPT[:4], extra_keys=[["s"]])),
        event(1, stored([12, 13], PROMPT[:8], lora_id=1, lora_name="poet", extra_keys=[["poet"], ["poet"]])),
        *asked("plain", PROMPT, 0),
        *asked("alias", PROMPT, 0, model="tiny-latest"),
        *asked("salted", PROMPT, 4, cache_salt="s"),
        *asked("other-salt", PROMPT, 0, cache_salt="t"),
        *asked("adapter", PROMPT, 8, model="poet"),
    ]
    report = check_capture(rows)
    assert (report.requests, report.mismatches) == (5, [])


def test_only_what_every_publisher_holds_alike_is_predicted() -> None:
    rows = [
        event(0, stored([11], PROMPT[:4]), port=1),
        *asked("one-is-silent-yet", PROMPT, 4),
        event(0, stored([11, 12], PROMPT[:8]), port=2),
        *asked("longer-on-one", PROMPT, 8),
        event(1, stored([12], PROMPT[4:8], parent=11), port=1),
        *asked("alike", PROMPT, 8),
        *asked("nowhere", PROMPT[1:], 0),
        event(2, CLEARED, port=1),
        *asked("cleared-on-one", PROMPT, 8),
    ]
    report = check_capture(rows)
    assert list(report.unsupported) == ["one-is-silent-yet", "longer-on-one", "cleared-on-one"]
    assert set(report.unsupported.values()) == {"its publishers differ"}
    assert (report.requests, report.mismatches) == (2, [])


def array_frame(*events: list[Any]) -> str:
    return msgspec.msgpack.encode([1.5, events]).hex()


def test_adapters_are_left_out_where_the_layout_hides_their_names() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "meta", "models": {"data": [{"id": "tiny"}, {"id": "poet", "parent": "tiny"}]}},
        {"kind": "event", "seq": 0, "payload_hex": array_frame(["BlockStored", [11], None, PROMPT[:4], 4, 1, "GPU"])},
        *asked("adapter", PROMPT, 4, model="poet"),
    ]
    assert check_capture(rows).unsupported == {"adapter": "the layout hides the names of adapters"}


def test_a_feed_that_cannot_be_trusted_predicts_nothing() -> None:
    unchained = array_frame(["BlockStored", [hash((1, 2))], None, [1, 2], 2, None, "GPU"])
    report = check_capture([{"kind": "event", "seq": 0, "payload_hex": unchained}, *asked("r", PROMPT, 0)])
    assert report.publishers[0].untrusted is not None
    assert report.unsupported == {"r": report.publishers[0].untrusted}


def test_frames_that_cannot_be_read_cost_what_was_known() -> None:
    rows = [STORED, {"kind": "event", "seq": 1, "payload_hex": "c1"}, *asked("r", PROMPT, 0)]
    report = check_capture(rows)
    assert (report.frames, report.events, report.mismatches, report.unreadable) == (2, 1, [], 1)


def test_each_publisher_is_reported_with_what_was_wrong() -> None:
    rows = [
        STORED,
        event(
            2, stored([21], PROMPT[:4]), stored([22], PROMPT[4:8], parent=99), stored([23], PROMPT[:3], block_size=4)
        ),
        event(3, stored([24], PROMPT[4:8], parent=21)),
    ]
    (publisher,) = check_capture(rows).publishers
    assert publisher == PublisherReport(
        name="",
        frames=3,
        malformed=0,
        gaps=1,
        restarts=0,
        events=5,
        unreadable=0,
        misfits=1,
        blocks=2,
        orphans=1,
        untrusted=None,
        limits=(MISFITS,),
    )


def test_without_requests_a_capture_need_not_store_anything() -> None:
    report = check_capture([event(0, CLEARED)])
    assert (report.frames, report.events, report.requests, report.publishers[0].blocks) == (1, 1, 0, 0)


@pytest.mark.parametrize("rows", [[], [{"kind": "meta"}], asked("r", PROMPT, 0)])
def test_a_capture_without_events_is_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(CaptureError, match="no events"):
        check_capture(rows)


def test_requests_need_the_engines_block_size() -> None:
    with pytest.raises(CaptureError, match="no readable BlockStored"):
        check_capture([event(0, CLEARED), *asked("r", PROMPT, 0)])


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "event", "seq": 1},
        {"kind": "event", "seq": 1, "payload_hex": "xyz"},
        {"kind": "event", "payload_hex": "c1"},
        {"kind": "request", "body": {}, "prompt_token_ids": [1]},
        {"kind": "request", "label": "r", "body": {}, "prompt_token_ids": [-1] * 8},
        {"kind": "request", "label": "r", "body": [1], "prompt_token_ids": [1]},
        {"kind": "meta", "models": ["tiny"]},
    ],
)
def test_a_row_of_another_shape_is_refused_by_its_number(row: dict[str, Any]) -> None:
    with pytest.raises(CaptureError, match="row 2"):
        check_capture([STORED, row])


# What the events leave open


def on(medium: str, hashes: list[int], tokens: list[int], **fields: Any) -> dict[str, Any]:
    return stored(hashes, tokens, medium=medium, **fields)


def pages(hashes: list[int], tokens: list[int], **fields: Any) -> dict[str, Any]:
    """As SGLang publishes them."""
    left_out = ("lora_name", "extra_keys")
    return {key: value for key, value in stored(hashes, tokens, **fields).items() if key not in left_out} | fields


def checked(*batches: list[dict[str, Any]], cached: int, **body: Any) -> tuple[int, list[str]]:
    """How many requests are compared, and why the others are not, where `PROMPT` had so many cached tokens."""
    rows = [event(seq, *events) for seq, events in enumerate(batches)]
    report = check_capture([*rows, *asked("r", PROMPT[:17], cached, **body)])
    assert not report.mismatches
    return report.requests, list(report.unsupported.values())


GPU = stored([11, 12, 13, 14], PROMPT[:16])
BARE = on("CPU", [11, 12, 13, 14], [], block_size=0)


@pytest.mark.parametrize(
    "batches",
    [
        [[GPU], [BARE], [removed([14, 13, 12, 11])]],
        [[GPU], [{**BARE, "block_size": 4}], [removed([14, 13, 12, 11])]],
        [[GPU], [removed([14, 13, 12, 11]), BARE]],
        [[GPU], [removed([14, 13, 12, 11]), {**BARE, "group_idx": 3}]],
        [
            [{**GPU, "group_idx": 1, "kv_cache_spec_kind": "full_attention"}],
            [BARE],
            [removed([14, 13, 12, 11], group_idx=1)],
        ],
        [[GPU, stored([77], PROMPT[30:32], parent=555)]],
    ],
    ids=["bare", "bare with a size", "removed first", "another group", "the device's group is 1", "partial parent"],
)
def test_what_is_off_loaded_without_its_tokens_is_predicted(batches: list[list[dict[str, Any]]]) -> None:
    assert checked(*batches, cached=16) == (1, [])


def test_a_reset_that_may_have_spared_a_slower_tier_leaves_what_rests_on_it_open() -> None:
    batches = [GPU], [BARE], [CLEARED]
    assert checked(*batches, cached=16) == (0, [RESET])
    assert checked(*batches, cached=0) == (0, [RESET])
    assert checked(*batches, [GPU], cached=16) == (1, [])


def test_a_tier_that_only_ever_stores_leaves_what_rests_on_it_open() -> None:
    chunk = on("cpu", [21], PROMPT[:16])
    assert checked([chunk], cached=0) == (0, [STORE_ONLY])
    assert checked([GPU, chunk], cached=16) == (1, [])
    assert checked([GPU, chunk, removed([14, 13, 12, 11])], cached=16) == (0, [STORE_ONLY])
    other = on("cpu", [31], PROMPT[16:32])
    assert checked([chunk, other, removed([31], medium="cpu")], cached=16) == (1, [])


def test_a_removal_of_a_block_stored_twice_is_open_unless_another_one_shows_what_removals_mean() -> None:
    twice = [GPU, stored([14], PROMPT[12:16], parent=13)]
    assert checked(twice, [removed([14])], cached=12) == (0, [COPIES])
    other = [stored([31], PROMPT[20:24]), stored([31], PROMPT[20:24]), removed([31]), removed([31])]
    assert checked(twice, [removed([14])], other, cached=16) == (1, [])
    assert checked(twice, [removed([14]), removed([14])], cached=12) == (1, [])


def test_a_removal_of_a_page_that_tenants_share_is_open() -> None:
    plain, salted = pages([1, 2], PROMPT[:8]), pages([1, 2], PROMPT[:8], cache_salt="tenant")
    assert checked([salted], cached=0) == (1, [])
    assert checked([salted], cached=8, cache_salt="tenant") == (1, [])
    assert checked([plain, salted], [removed([2, 1])], cached=8) == (0, [SHARED_PAGES])
    assert checked([plain, salted], [removed([2, 1]), removed([2, 1])], cached=0) == (1, [])


def test_a_client_s_extra_key_leaves_prompts_with_the_same_first_page_open() -> None:
    rows = [
        *asked("keyed", PROMPT, 0, extra_key="k"),
        *asked("short", [9, 9], 0, extra_key="k"),
        event(0, pages([1, 2], PROMPT[:8])),
        *asked("same", PROMPT, 0),
        *asked("grown", [9, 9, 1, 2, 3], 0),
        *asked("other", PROMPT[8:], 0),
    ]
    report = check_capture(rows)
    assert report.unsupported == {
        "keyed": EXTRA_KEY,
        "short": EXTRA_KEY,
        "same": EXTRA_KEY_SHARED,
        "grown": EXTRA_KEY_SHARED,
    }
    assert (report.requests, report.mismatches) == (1, [])


GROUP: dict[str, Any] = {"group_idx": 1, "kv_cache_spec_kind": "mamba"}


def test_groups_that_name_blocks_in_other_ways_leave_longer_hits_open_but_not_shorter_ones() -> None:
    full = {**GPU, "group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    assert checked([full, stored([31], PROMPT[:16], block_size=4, **GROUP)], cached=4) == (0, [UNLINKED])
    assert checked([full, stored([12], PROMPT[:16], block_size=4, **GROUP)], cached=8) == (1, [])


def test_an_unknown_kind_of_attention_leaves_shorter_hits_open_but_not_longer_ones() -> None:
    full = {**GPU, "group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    dreams = stored([11], PROMPT[:4], group_idx=1, kv_cache_spec_kind="dreams")
    requests, (reason,) = checked([full, dreams], cached=4)
    assert requests == 0
    assert "does not know (dreams)" in reason
    rows = [event(0, full, dreams), *asked("r", PROMPT, 20)]
    assert mismatches(check_capture(rows)) == [("r", 16, 20)]
