"""A feed whose owner calls its methods in any order, with frames in any order: it never meets an impossible input."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents import feed as feed_module
from matrixinfer.kvevents.feed import FeedState, PodFeed

from .support import CLEARED, MODEL, Follower, frame, stored

BLOCKS = TokenBlockProcessor(1)
PAYLOADS = (
    b"\xc1",
    frame(),
    frame(stored([1], [1])),
    frame(stored([2], [2])),
    frame(CLEARED),
    frame(["BlockRemoved"]),
    frame({**stored([1], [1]), "block_size": "16"}),
    frame(["BlockStored", [hash((1,))], None, [1], 1, None]),  # cannot be trusted
)
FRAMES = st.tuples(st.integers(0, 6), st.sampled_from(PAYLOADS))
CALLS = st.one_of(
    st.tuples(st.sampled_from(["live", "live", "replayed"]), FRAMES),
    st.tuples(st.just("heartbeat"), st.lists(FRAMES, max_size=2)),
    st.tuples(
        st.sampled_from(
            [
                "replay_ended",
                "replay_broke_off",
                "replay_failed",
                "catch_up",
                "heartbeat_missed",
                "disconnected",
                "reconnected",
                "start_over",
                "purge",
                "failed_to_apply",
            ]
        ),
        st.none(),
    ),
)


@pytest.mark.parametrize("can_replay", [True, False])
@given(calls=st.lists(CALLS, max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_call_is_possible_at_any_time(can_replay: bool, calls: list[tuple[str, tuple[object, ...] | None]]) -> None:
    follower = Follower(BLOCKS, strict=False)
    feed = PodFeed(follower.ledger, can_replay=can_replay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_module, "MAX_HELD_FRAMES", 3)
        for name, given_ in calls:
            method = getattr(feed, name)
            if name == "heartbeat":
                method(given_)
            else:
                method(*(given_ or ()))
            assert feed.backlog <= 3
            assert not (feed.state is FeedState.UNTRUSTED and follower.index.contents())
            assert feed.replay_from is None or can_replay
    feed.start_over()
    assert not follower.index.contents().get(MODEL)
