from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.feedtools.view import FeedView
from tests.unit.kvevents.support import CLEARED, frame, removed, stored

TOKENS = list(range(48))
FULL_3: dict[str, Any] = {"group_idx": 3, "kv_cache_spec_kind": "full_attention"}


def kinds(view: FeedView, seq: int, *events: Any) -> list[str]:
    return [line.kind for line in view.frame(seq, "kv", frame(*events))]


def test_a_feed_from_its_start_is_shown_and_summed_up() -> None:
    view = FeedView()
    assert kinds(view, 0, stored([1, 2], TOKENS[:32]), removed([2])) == ["stored", "removed"]
    assert kinds(view, 1, CLEARED) == ["cleared"]
    assert kinds(view, 2, stored([1], TOKENS[:16]), stored([5], TOKENS[:16], medium="CPU", **FULL_3)) == ["stored"] * 2
    summary = view.summary()
    assert (summary.frames, summary.events, summary.blocks, summary.block_size) == (3, 5, 2, 16)
    assert (summary.media, summary.groups, summary.salts_visible) == (["GPU", "CPU"], [0, 3], True)
    assert str(summary) == (
        "3 frames, 5 events; 2 blocks of 16 tokens held now\n  on GPU and CPU; groups 0 and 3; salts visible"
    )


def test_nothing_yet_is_shown_as_nothing() -> None:
    summary = FeedView().summary()
    assert (summary.block_size, summary.salts_visible) == (None, None)
    assert str(summary) == "0 frames, 0 events; 0 blocks held now"


def test_a_gap_makes_the_view_forget() -> None:
    view = FeedView()
    kinds(view, 0, stored([1], TOKENS[:16]))
    assert kinds(view, 3, stored([2], TOKENS[16:32], parent=1)) == ["gap", "stored"]
    summary = view.summary()
    assert (summary.blocks, summary.gaps, summary.missing, summary.orphans) == (0, 1, 2, 1)


def test_smaller_numbers_are_a_restart_that_may_have_a_gap_of_its_own() -> None:
    view = FeedView()
    kinds(view, 5, stored([1], TOKENS[:16]))
    assert kinds(view, 5, CLEARED) == ["restart", "gap", "cleared"]
    assert kinds(view, 0, CLEARED) == ["restart", "cleared"]
    summary = view.summary()
    assert (summary.restarts, summary.gaps, summary.missing, summary.blocks) == (2, 1, 5, 0)


def test_a_frame_that_comes_twice_counts_its_events_once() -> None:
    view = FeedView()
    kinds(view, 0, stored([1], TOKENS[:16]))
    assert kinds(view, 0, stored([1], TOKENS[:16])) == ["duplicate"]
    summary = view.summary()
    assert (summary.frames, summary.events, summary.blocks, summary.restarts) == (2, 1, 1, 0)


def test_unreadable_events_are_shown_after_those_that_can_be_read() -> None:
    assert kinds(FeedView(), 0, {"type": "Unheard"}, CLEARED) == ["cleared", "unreadable"]


def test_misfits_are_remarked_upon() -> None:
    view = FeedView()
    (line,) = view.frame(0, None, frame(stored([1], TOKENS[:3], block_size=16)))
    assert line.details["remark"] == "ignored, its tokens do not fit its blocks"
    assert view.summary().misfits == 1


def test_layouts_that_hide_salts_are_named() -> None:
    view = FeedView()
    kinds(view, 0, ["BlockStored", [2**63], None, TOKENS[:16], 16, None, "GPU"])
    assert view.summary().salts_visible is False
    assert "salts hidden" in str(view.summary())


def test_what_cannot_be_trusted_is_shown_once_until_the_engine_restarts() -> None:
    view = FeedView()
    unchained = ["BlockStored", [hash((1, 2))], None, [1, 2], 2, None, "GPU"]
    first, second = view.frame(0, None, frame(unchained, unchained))
    assert "not trusted" in first.words
    assert "not trusted" not in second.words
    summary = view.summary()
    assert summary.blocks == 0
    assert f"not trusted: {summary.untrusted}" in str(summary)
    kinds(view, 0, stored([1], TOKENS[:16]))
    assert (view.summary().untrusted, view.summary().blocks) == (None, 1)


def test_other_topics_are_counted_and_shown_once() -> None:
    view = FeedView(topic="other")
    assert kinds(view, 0, CLEARED) == ["wrong"]
    assert kinds(view, 1, CLEARED) == []
    assert [line.kind for line in view.frame(0, "other", frame(CLEARED))] == ["cleared"]
    assert [line.kind for line in view.frame(1, None, frame(CLEARED))] == ["cleared"]
    assert view.summary().other_topic == 2


def test_what_is_kept_for_the_summary_is_bounded() -> None:
    view = FeedView()
    for group in range(100):
        kinds(view, group, removed([1], medium=f"m{group}", group_idx=group))
    assert len(view.summary().media) == len(view.summary().groups) == 16


@given(st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=40))))
def test_any_bytes_are_survived(frames: list[tuple[int, bytes]]) -> None:
    view = FeedView(with_tokens=True)
    for seq, payload in frames:
        for line in view.frame(seq, None, payload):
            msgspec.json.encode(line.value())
            assert str(line)
    assert view.summary().frames == len(frames)
    assert str(view.summary())
