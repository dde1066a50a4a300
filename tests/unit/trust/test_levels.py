from __future__ import annotations

import pytest

from matrixinfer.kvevents.feed import FeedState
from matrixinfer.trust.levels import trust


@pytest.mark.parametrize(
    ("state", "alive"),
    [
        (FeedState.COMPLETE, "exact"),
        (FeedState.PARTIAL, "partial"),
        (FeedState.SYNCING, "stale"),
        (FeedState.STALE, "stale"),
        (FeedState.UNTRUSTED, "none"),
        (None, "none"),
    ],
)
def test_trust_is_that_of_the_feed_unless_it_is_silent_or_doubted(state: FeedState | None, alive: str) -> None:
    assert trust(state, silent=False, doubted=False) == alive
    less = "none" if alive == "none" else "stale"
    for silent, doubted in ((True, False), (False, True), (True, True)):
        assert trust(state, silent=silent, doubted=doubted) == less


def test_every_state_of_a_feed_has_its_trust() -> None:
    assert {trust(state, silent=False, doubted=False) for state in FeedState} == {"exact", "partial", "stale", "none"}
