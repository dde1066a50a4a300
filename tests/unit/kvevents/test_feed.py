from collections.abc import Iterable

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents import feed as feed_module
from matrixinfer.kvevents.feed import FeedState, PodFeed

from .support import CLEARED, Follower, frame, removed, stored

COMPLETE, PARTIAL, SYNCING = FeedState.COMPLETE, FeedState.PARTIAL, FeedState.SYNCING
PROMPT = list(range(100))
FRAMES = [frame(stored([100 + n], [n], parent=99 + n if n else None), timestamp=n) for n in range(100)]
"""Batch n stores the n-th block of the prompt; a block holds one token."""

OTHER = [5000 + n for n in range(100)]
RESTARTED = [frame(stored([900 + n], [5000 + n], parent=899 + n if n else None), timestamp=n) for n in range(100)]
"""The same of another prompt, by the engine that comes after a restart."""


class Feed(PodFeed):
    """A feed with its index at hand."""

    def __init__(self, *, can_replay: bool = True) -> None:
        self.follower = Follower(TokenBlockProcessor(1))
        super().__init__(self.follower.ledger, can_replay=can_replay)

    def hear(self, numbers: Iterable[int], frames: list[bytes] = FRAMES) -> None:
        for number in numbers:
            self.live(number, frames[number])

    def replay(self, numbers: Iterable[int], frames: list[bytes] = FRAMES) -> None:
        """Hand over a replay, until the feed wants another one."""
        asked = (self.replay_from, self.epoch)
        for number in numbers:
            self.replayed(number, frames[number])
            if (self.replay_from, self.epoch) != asked:
                return
        self.replay_ended()

    @property
    def held(self) -> int:
        return self.follower.held(PROMPT)


def complete_feed(upto: int) -> Feed:
    feed = Feed()
    feed.replay(range(upto))
    assert (feed.state, feed.replay_from, feed.held) == (COMPLETE, None, upto)
    return feed


def test_a_feed_begins_by_asking_for_all_history_and_holds_live_frames() -> None:
    feed = Feed()
    assert (feed.state, feed.replay_from) == (SYNCING, 0)
    feed.hear([3, 4])
    assert feed.held == 0
    feed.replay(range(4))
    assert (feed.state, feed.held, feed.replay_from) == (COMPLETE, 5, None)
    assert (feed.stats.replays, feed.stats.duplicates, feed.stats.frames) == (1, 1, 6)
    assert feed.stats.bytes == sum(map(len, [*FRAMES[:4], *FRAMES[3:5]]))


def test_an_engine_that_has_published_nothing_is_known_completely() -> None:
    feed = Feed()
    feed.replay([])
    assert feed.state is COMPLETE
    feed.hear([0, 1])
    assert (feed.state, feed.held) == (COMPLETE, 2)


def test_an_engine_whose_first_batch_was_lost_is_asked_for_it() -> None:
    feed = Feed()
    feed.replay([])
    feed.hear([1])
    assert (feed.state, feed.replay_from, feed.held) == (SYNCING, 0, 0)
    feed.replay([0, 1])
    assert (feed.state, feed.replay_from, feed.held) == (COMPLETE, None, 2)


def test_a_gap_asks_for_a_replay_and_holds_what_follows() -> None:
    feed = complete_feed(3)
    feed.hear([5, 6, 7])
    assert (feed.replay_from, feed.held, feed.stats.gaps) == (3, 3, 1)
    feed.replay(range(3, 7))
    assert (feed.state, feed.replay_from, feed.held) == (COMPLETE, None, 8)
    assert feed.stats.duplicates == 2


def test_a_held_removal_is_applied_after_the_store_that_was_lost() -> None:
    feed = complete_feed(1)
    gone = frame(removed([101]))
    feed.live(2, gone)
    assert feed.held == 1
    feed.replay([1])
    assert feed.held == 1
    feed.live(3, frame(stored([102], [2], parent=101)))
    assert feed.ledger.stats.orphans == 1


def test_frames_lost_while_a_gap_is_replayed_are_a_gap_of_their_own() -> None:
    feed = complete_feed(3)
    feed.hear([5, 8, 9])
    feed.replay(range(3, 7))
    assert (feed.replay_from, feed.held, feed.stats.gaps) == (7, 7, 2)
    feed.replay(range(7, 10))
    assert (feed.state, feed.held) == (COMPLETE, 10)


def test_history_that_is_no_longer_to_be_had_leaves_the_feed_partial() -> None:
    feed = Feed()
    feed.replay([2, 3])
    assert (feed.state, feed.held, feed.ledger.stats.orphans) == (PARTIAL, 0, 2)
    feed.live(4, frame(stored([1], PROMPT[:1])))
    assert (feed.state, feed.held) == (PARTIAL, 1)


def test_a_gap_whose_beginning_is_no_longer_to_be_had_clears_and_goes_on_partially() -> None:
    feed = complete_feed(3)
    feed.hear([6])
    feed.replay([5, 6])
    assert (feed.state, feed.held, feed.replay_from) == (PARTIAL, 0, None)


def test_a_hole_in_a_replay_is_asked_for_again() -> None:
    feed = Feed()
    feed.hear([6, 7])
    feed.replay([0, 1, 3, 4])
    assert (feed.state, feed.held, feed.replay_from, feed.stats.gaps) == (SYNCING, 2, 2, 1)
    feed.replay([2, 3, 5])
    assert (feed.state, feed.held, feed.replay_from) == (SYNCING, 4, 4)
    feed.replay([4, 5, 6])
    assert (feed.state, feed.held, feed.replay_from) == (COMPLETE, 8, None)


def test_a_hole_that_the_engine_no_longer_has_clears_and_goes_on_partially() -> None:
    feed = Feed()
    feed.replay([0, 1, 3])
    feed.replayed(3, frame(stored([7], PROMPT[:1])))
    feed.replay_ended()
    assert (feed.state, feed.held, feed.replay_from) == (PARTIAL, 1, None)


def test_a_replay_that_breaks_off_goes_on_from_where_it_stopped() -> None:
    feed = Feed()
    feed.replay_broke_off()
    assert (feed.state, feed.replay_from) == (SYNCING, 0)
    feed.replayed(0, FRAMES[0])
    feed.replayed(1, FRAMES[1])
    feed.replay_broke_off()
    assert (feed.state, feed.replay_from, feed.held) == (SYNCING, 2, 2)
    feed.replay([2])
    assert (feed.state, feed.replay_from, feed.held) == (COMPLETE, None, 3)


def test_a_replay_that_was_given_up_is_marked_until_the_feed_starts_over() -> None:
    feed = Feed()
    feed.replay_failed()
    assert feed.given_up
    feed.start_over()
    assert not feed.given_up


def test_a_lost_connection_makes_a_feed_stale_until_it_starts_over() -> None:
    feed = complete_feed(3)
    feed.hear([5])
    epoch = feed.epoch
    feed.disconnected()
    assert (feed.state, feed.replay_from, feed.held) == (FeedState.STALE, None, 3)
    assert feed.epoch > epoch
    feed.hear([3, 4])
    assert (feed.state, feed.held) == (FeedState.STALE, 3)
    feed.start_over()
    feed.replay(range(6))
    assert (feed.state, feed.held) == (COMPLETE, 6)


def test_a_stale_feed_without_replay_goes_on_as_partly_known() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0])
    feed.disconnected()
    assert (feed.state, feed.held) == (FeedState.STALE, 1)
    feed.start_over()
    feed.live(4, frame(stored([7], PROMPT[:1])))
    assert (feed.state, feed.held) == (PARTIAL, 1)


def test_a_frame_that_could_not_be_applied_voids_what_was_known() -> None:
    feed = complete_feed(3)
    feed.spoiled()
    assert (feed.state, feed.held, feed.stats.malformed) == (PARTIAL, 0, 1)


def test_a_replay_without_what_is_missing_leaves_it_asked_for() -> None:
    feed = complete_feed(3)
    feed.hear([5])
    feed.replay([])
    assert (feed.replay_from, feed.held) == (3, 3)
    feed.replay_failed()
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, None, 0)


def test_a_failed_replay_goes_on_from_what_was_held() -> None:
    feed = complete_feed(3)
    feed.live(5, frame(CLEARED))
    feed.live(6, frame(stored([7], PROMPT[:1])))
    feed.replay_failed()
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, None, 1)
    feed.live(7, frame(stored([8], PROMPT[1:2], parent=7)))
    assert feed.held == 2


def test_a_partial_feed_asks_again_at_its_next_gap() -> None:
    feed = Feed()
    feed.replay_failed()
    feed.live(5, frame(stored([7], PROMPT[:1])))
    feed.live(7, frame(removed([7])))
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, 6, 1)
    feed.replayed(6, frame(stored([8], PROMPT[1:2], parent=7)))
    feed.replay_ended()
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, None, 0)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_smaller_live_number_is_a_new_engine(number: int) -> None:
    feed = complete_feed(6)
    epoch = feed.epoch
    feed.live(number, RESTARTED[number])
    assert (feed.held, feed.state, feed.replay_from, feed.stats.restarts) == (0, SYNCING, 0, 1)
    assert feed.epoch > epoch
    feed.replay(range(number + 1), RESTARTED)
    assert (feed.state, feed.follower.held(OTHER), feed.held) == (COMPLETE, number + 1, 0)


def test_the_last_number_with_other_bytes_is_a_new_engine_and_with_the_same_a_duplicate() -> None:
    feed = complete_feed(6)
    feed.hear([5])
    assert (feed.state, feed.held, feed.stats.duplicates) == (COMPLETE, 6, 1)
    feed.hear([5], RESTARTED)
    assert (feed.state, feed.held, feed.stats.restarts) == (SYNCING, 0, 1)


def test_a_new_engine_that_shows_while_a_replay_is_awaited_voids_what_was_held() -> None:
    feed = complete_feed(3)
    feed.hear([5, 6])
    epoch = feed.epoch
    feed.hear([0, 1], RESTARTED)
    assert (feed.state, feed.replay_from, feed.held, feed.stats.restarts) == (SYNCING, 0, 0, 1)
    assert feed.epoch > epoch
    feed.replay([0], RESTARTED)
    assert (feed.state, feed.follower.held(OTHER)) == (COMPLETE, 2)


def test_a_new_connection_starts_over() -> None:
    feed = complete_feed(3)
    feed.hear([5])
    epoch = feed.epoch
    feed.start_over()
    assert (feed.state, feed.replay_from, feed.held) == (SYNCING, 0, 0)
    assert feed.epoch > epoch
    feed.replay(range(6), RESTARTED)
    assert (feed.state, feed.held, feed.follower.held(OTHER)) == (COMPLETE, 0, 6)


def test_late_answers_to_a_replay_that_is_over_change_nothing() -> None:
    feed = complete_feed(3)
    feed.replayed(3, FRAMES[3])
    feed.replay_ended()
    feed.replay_failed()
    assert (feed.state, feed.held, feed.stats.replays) == (COMPLETE, 3, 1)


@pytest.mark.parametrize(("limit", "bound"), [("MAX_HELD_FRAMES", 3), ("MAX_HELD_BYTES", 3 * len(FRAMES[50]))])
def test_held_frames_are_bounded(monkeypatch: pytest.MonkeyPatch, limit: str, bound: int) -> None:
    monkeypatch.setattr(feed_module, limit, bound)
    feed = complete_feed(3)
    feed.hear([50, 51, 52])
    assert (feed.replay_from, feed.stats.overflows) == (3, 0)
    feed.hear([53])
    assert (feed.state, feed.replay_from, feed.stats.overflows, feed.held) == (PARTIAL, None, 1, 0)
    feed.live(54, frame(stored([1], PROMPT[:1])))
    assert feed.held == 1


# Without replay


def test_without_replay_a_feed_takes_what_comes_as_partly_known() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0, 1])
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, None, 2)


def test_without_replay_a_loss_clears() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0, 1, 3])
    assert (feed.state, feed.replay_from, feed.held, feed.stats.gaps) == (PARTIAL, None, 0, 1)
    feed.live(4, frame(stored([1], PROMPT[:1])))
    assert feed.held == 1


def test_without_replay_a_new_engine_is_taken_from_its_first_frame_on() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0, 1, 2])
    feed.hear([0, 1], RESTARTED)
    assert (feed.held, feed.follower.held(OTHER), feed.replay_from, feed.stats.restarts) == (0, 2, None, 1)


def test_without_replay_a_new_connection_clears() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0, 1, 2])
    feed.start_over()
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, None, 0)


# Frames that cannot be read


def test_a_malformed_frame_is_counted_and_leaves_the_feed_partial() -> None:
    feed = complete_feed(3)
    feed.live(3, b"\xc1")
    feed.hear([4])
    assert (feed.state, feed.replay_from, feed.held, feed.stats.malformed) == (PARTIAL, None, 3, 1)


def test_an_unreadable_event_is_counted_and_leaves_the_feed_partial() -> None:
    feed = complete_feed(3)
    feed.live(3, frame({"type": "BlockMoved"}, stored([103], [3], parent=102), ["odd"]))
    assert (feed.state, feed.held, feed.stats.unreadable_events) == (PARTIAL, 4, 2)


def test_a_malformed_frame_in_a_replay_leaves_the_feed_partial_until_the_next_start() -> None:
    feed = Feed()
    feed.replayed(0, b"")
    feed.replay_ended()
    assert feed.state is PARTIAL
    feed.start_over()
    feed.replay(range(2))
    assert (feed.state, feed.held) == (COMPLETE, 2)
