from collections.abc import Iterable

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents import feed as feed_module
from matrixinfer.kvevents import limits
from matrixinfer.kvevents.counts import UntrustedEvents
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import Event

from .support import CLEARED, Follower, frame, removed, stored

COMPLETE, PARTIAL, STALE = FeedState.COMPLETE, FeedState.PARTIAL, FeedState.STALE
SYNCING, UNTRUSTED = FeedState.SYNCING, FeedState.UNTRUSTED
PROMPT = list(range(100))
FRAMES = [frame(stored([100 + n], [n], parent=99 + n if n else None), timestamp=n) for n in range(100)]
"""Batch n stores the n-th block of the prompt; a block holds one token."""

OTHER = [5000 + n for n in range(100)]
RESTARTED = [frame(stored([900 + n], [5000 + n], parent=899 + n if n else None), timestamp=n) for n in range(100)]
"""The same of another prompt, by the engine that comes after a restart."""

ROOT = frame(stored([7], PROMPT[:1]))
"""Stores the first block of the prompt, as any batch may."""


class Feed(PodFeed):
    """A feed with its index at hand."""

    def __init__(self, *, can_replay: bool = True) -> None:
        self.follower = Follower(TokenBlockProcessor(1))
        super().__init__(self.follower.ledger, can_replay=can_replay)

    def hear(self, numbers: Iterable[int], frames: list[bytes] = FRAMES) -> None:
        for number in numbers:
            self.live(number, frames[number])

    def replay(self, numbers: Iterable[int], frames: list[bytes] = FRAMES, *, whole: bool = True) -> None:
        """Hand over a replay, until the feed wants another one, have it confirmed when it was whole, and catch up."""
        epoch, restarts = self.epoch, self.stats.restarts
        number = None
        for number in numbers:
            self.replayed(number, frames[number])
            if self.epoch != epoch:
                break
        else:
            self.replay_ended() if whole else self.replay_broke_off()
            if whole and number is not None and self.replay_from == number and self.stats.restarts == restarts:
                self.replayed(number, frames[number])
                self.replay_ended()
        self.settle()

    def fail(self) -> None:
        self.replay_failed()
        self.settle()

    def settle(self) -> None:
        while self.catch_up():
            pass

    @property
    def held(self) -> int:
        return self.follower.held(PROMPT)

    @property
    def held_of_other(self) -> int:
        return self.follower.held(OTHER)


def complete_feed(upto: int) -> Feed:
    feed = Feed()
    feed.replay(range(upto))
    assert (feed.state, feed.replay_from, feed.held) == (COMPLETE, None, upto)
    return feed


# The beginning


def test_a_feed_begins_by_asking_for_all_history_and_holds_live_frames() -> None:
    feed = Feed()
    assert (feed.state, feed.replay_from) == (SYNCING, 0)
    feed.hear([3, 4])
    assert (feed.held, feed.backlog) == (0, 2)
    feed.replay(range(4))
    assert (feed.state, feed.held, feed.replay_from, feed.backlog) == (COMPLETE, 5, None, 0)
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


def test_history_that_the_engine_no_longer_has_leaves_the_feed_partial() -> None:
    feed = Feed()
    feed.replay([2, 3])
    assert (feed.state, feed.held, feed.ledger.stats.orphans, feed.stats.truncated) == (PARTIAL, 0, 2, 1)
    feed.live(4, ROOT)
    assert (feed.state, feed.held) == (PARTIAL, 1)


# Gaps


def test_a_gap_asks_for_a_replay_from_the_last_frame_and_holds_what_follows() -> None:
    feed = complete_feed(3)
    feed.hear([5, 6, 7])
    assert (feed.state, feed.replay_from, feed.held, feed.stats.gaps) == (SYNCING, 2, 3, 1)
    feed.replay(range(2, 7))
    assert (feed.state, feed.replay_from, feed.held) == (COMPLETE, None, 8)
    assert feed.stats.duplicates == 4


def test_a_held_removal_is_applied_after_the_store_that_was_lost() -> None:
    feed = complete_feed(1)
    feed.live(2, frame(removed([101])))
    assert feed.held == 1
    feed.replay([0, 1])
    assert feed.held == 1
    feed.live(3, frame(stored([102], [2], parent=101)))
    assert feed.ledger.stats.orphans == 1


def test_frames_lost_while_a_gap_is_replayed_are_a_gap_of_their_own() -> None:
    feed = complete_feed(3)
    feed.hear([5, 8, 9])
    feed.replay(range(2, 7))
    assert (feed.replay_from, feed.held, feed.stats.gaps, feed.backlog) == (6, 7, 2, 2)
    feed.replay(range(6, 10))
    assert (feed.state, feed.held) == (COMPLETE, 10)


def test_held_frames_are_applied_one_by_one_and_new_ones_wait_for_their_turn() -> None:
    feed = complete_feed(1)
    feed.hear([2, 3])
    for number in (0, 1):
        feed.replayed(number, FRAMES[number])
    feed.replay_ended()
    assert (feed.state, feed.held, feed.backlog) == (SYNCING, 2, 2)
    assert feed.catch_up()
    feed.hear([4])
    assert (feed.state, feed.held, feed.backlog) == (SYNCING, 3, 2)
    feed.settle()
    assert (feed.state, feed.held, feed.backlog) == (COMPLETE, 5, 0)


def test_a_gap_whose_beginning_the_engine_no_longer_has_clears_and_goes_on_partially() -> None:
    feed = complete_feed(3)
    feed.hear([6])
    feed.replay([5, 6])
    assert (feed.state, feed.held, feed.replay_from, feed.stats.truncated) == (PARTIAL, 0, None, 1)


def test_a_hole_in_a_replay_is_asked_for_again() -> None:
    feed = Feed()
    feed.hear([6, 7])
    feed.replay([0, 1, 3, 4])
    assert (feed.state, feed.held, feed.replay_from, feed.stats.gaps) == (SYNCING, 2, 1, 1)
    feed.replay([1, 2, 3, 5])
    assert (feed.state, feed.held, feed.replay_from) == (SYNCING, 4, 3)
    feed.replay([3, 4, 5, 6])
    assert (feed.state, feed.held, feed.replay_from) == (COMPLETE, 8, None)


def test_a_hole_right_after_the_last_frame_voids_the_rest_of_the_replay() -> None:
    feed = complete_feed(3)
    feed.hear([6])
    feed.replay([2, 4, 5])
    assert (feed.state, feed.held, feed.replay_from, feed.stats.truncated) == (SYNCING, 3, 2, 0)


def test_a_replay_that_breaks_off_goes_on_from_where_it_stopped() -> None:
    feed = Feed()
    feed.replay([], whole=False)
    assert (feed.state, feed.replay_from) == (SYNCING, 0)
    feed.replay([0, 1], whole=False)
    assert (feed.state, feed.replay_from, feed.held) == (SYNCING, 1, 2)
    feed.replay([1, 2])
    assert (feed.state, feed.replay_from, feed.held) == (COMPLETE, None, 3)


def test_frames_missing_before_an_end_marker_show_by_the_live_frames_that_follow() -> None:
    feed = complete_feed(3)
    feed.hear([6])
    feed.replay([2, 3])
    assert (feed.state, feed.held, feed.replay_from) == (SYNCING, 4, 3)
    feed.replay([3, 4, 5, 6])
    assert (feed.state, feed.held) == (COMPLETE, 7)


def test_a_replay_that_fails_clears_and_goes_on_from_what_was_held() -> None:
    feed = complete_feed(3)
    feed.live(5, frame(stored([8], PROMPT[1:2], parent=102)))
    feed.live(6, ROOT)
    feed.fail()
    assert (feed.state, feed.replay_from, feed.held, feed.given_up) == (PARTIAL, None, 1, True)
    feed.live(7, frame(stored([8], PROMPT[1:2], parent=7)))
    assert feed.held == 2


def test_a_replay_that_was_given_up_is_marked_until_the_feed_starts_over() -> None:
    feed = Feed()
    feed.fail()
    assert feed.given_up
    feed.start_over()
    assert (feed.given_up, feed.state, feed.replay_from) == (False, SYNCING, 0)


def test_a_partial_feed_asks_again_at_its_next_gap() -> None:
    feed = Feed()
    feed.fail()
    feed.live(5, ROOT)
    feed.live(7, frame(removed([7])))
    assert (feed.state, feed.replay_from, feed.held) == (SYNCING, 5, 1)
    feed.replayed(5, ROOT)
    feed.replayed(6, frame(stored([8], PROMPT[1:2], parent=7)))
    feed.replay_ended()  # the held frame continues it
    feed.settle()
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, None, 0)


def test_late_answers_to_a_replay_that_is_over_change_nothing() -> None:
    feed = complete_feed(3)
    feed.replayed(3, FRAMES[3])
    feed.replay_ended()
    feed.replay_broke_off()
    feed.replay_failed()
    assert (feed.state, feed.held, feed.stats.replays, feed.replay_from) == (COMPLETE, 3, 2, None)


@pytest.mark.parametrize(("limit", "bound"), [("MAX_HELD_FRAMES", 3), ("MAX_HELD_BYTES", 3 * len(FRAMES[50]))])
def test_held_frames_are_bounded(monkeypatch: pytest.MonkeyPatch, limit: str, bound: int) -> None:
    monkeypatch.setattr(feed_module, limit, bound)
    feed = complete_feed(3)
    feed.hear([50, 51, 52])
    assert (feed.replay_from, feed.stats.overflows) == (2, 0)
    epoch = feed.epoch
    feed.hear([53])
    assert (feed.state, feed.replay_from, feed.stats.overflows, feed.held) == (PARTIAL, None, 1, 0)
    assert (feed.backlog, feed.given_up) == (0, True)
    assert feed.epoch > epoch
    feed.live(54, ROOT)
    assert feed.held == 1


# Replays whose end is lost


def test_an_end_marker_alone_does_not_prove_that_nothing_was_lost_before_it() -> None:
    feed = Feed()
    for numbers, state, held in (([0, 1], SYNCING, 2), ([1, 2], SYNCING, 3), ([2], COMPLETE, 3)):
        for number in numbers:
            feed.replayed(number, FRAMES[number])
        feed.replay_ended()
        assert (feed.state, feed.held) == (state, held)


def test_a_live_frame_that_continues_a_replay_proves_its_end() -> None:
    feed = Feed()
    feed.hear([2])
    for number in (0, 1):
        feed.replayed(number, FRAMES[number])
    feed.replay_ended()
    feed.settle()
    assert (feed.state, feed.held, feed.replay_from) == (COMPLETE, 3, None)


def test_live_frames_that_come_after_the_replay_that_brought_them_are_duplicates() -> None:
    feed = complete_feed(3)
    feed.hear([5])
    feed.replay(range(2, 9))
    feed.hear([6, 7, 8, 9])
    assert (feed.state, feed.held, feed.stats.restarts, feed.stats.gaps) == (COMPLETE, 10, 0, 1)
    feed.hear([8])
    assert feed.stats.restarts == 1


def test_a_new_engines_frame_held_behind_the_old_engines_replay_is_no_duplicate() -> None:
    feed = complete_feed(6)
    feed.disconnected()
    feed.reconnected()
    feed.hear([0], RESTARTED)
    feed.replay([5])
    assert (feed.replay_from, feed.held, feed.stats.restarts) == (0, 0, 1)


def test_an_engine_that_keeps_its_history_and_replays_nothing_has_restarted_and_published_nothing() -> None:
    feed = complete_feed(6)
    feed.disconnected()
    feed.reconnected()
    feed.replay([])
    assert (feed.state, feed.held, feed.replay_from) == (SYNCING, 0, 0)
    feed.replay([])
    assert (feed.state, feed.held, feed.stats.restarts) == (COMPLETE, 0, 1)
    feed.disconnected()  # and once more, before anything is published
    feed.reconnected()
    feed.replay([])
    assert feed.state is COMPLETE
    feed.hear([0], RESTARTED)
    assert (feed.state, feed.held_of_other) == (COMPLETE, 1)


def test_a_heartbeat_shows_that_an_engine_keeps_its_history() -> None:
    feed = Feed()
    feed.replay([])
    feed.hear(range(3))
    feed.heartbeat([(2, FRAMES[2])])
    feed.heartbeat([])  # it has restarted in silence
    feed.replay([])
    feed.replay([])
    assert (feed.state, feed.held, feed.stats.restarts) == (COMPLETE, 0, 1)


def test_an_engine_that_has_never_replayed_a_frame_and_replays_nothing_is_partly_known() -> None:
    feed = Feed()
    feed.replay([])
    feed.hear(range(6))
    feed.disconnected()
    feed.reconnected()
    feed.replay([])  # it may keep nothing, and be the same engine
    feed.replay([])
    assert (feed.state, feed.held, feed.given_up) == (PARTIAL, 0, False)
    feed.hear([0], RESTARTED)
    assert (feed.state, feed.held_of_other) == (COMPLETE, 1)


def test_an_engine_that_has_shown_its_restart_and_replays_nothing_has_published_nothing() -> None:
    for knows_before in (True, False):
        feed = Feed()
        feed.replay([])
        feed.hear(range(6))
        assert not feed.engine_restarted()  # the events say all
        feed.disconnected()
        if knows_before:
            assert not feed.engine_restarted()
        feed.reconnected()
        feed.replay([])
        feed.replay([])
        if not knows_before:
            assert feed.state is PARTIAL
            assert feed.engine_restarted()
            feed.start_over()
            feed.replay([])
        assert (feed.state, feed.held) == (COMPLETE, 0)


def test_a_new_engines_frame_that_it_does_not_replay_is_missed() -> None:
    feed = complete_feed(6)
    feed.disconnected()
    feed.reconnected()
    feed.hear([1], RESTARTED)
    feed.replay([])
    feed.replay([])
    assert (feed.state, feed.held_of_other) == (PARTIAL, 0)


# Layouts that hide something


def test_an_engine_whose_layout_hides_salts_is_partly_known_until_another_one_comes() -> None:
    feed = Feed()
    feed.replay([])
    feed.live(0, frame(["BlockStored", [1], None, [0], 1, None, "GPU", None]))
    assert (feed.ledger.hides_salts, feed.state) == (True, PARTIAL)
    feed.live(1, frame(CLEARED))
    assert feed.state is PARTIAL
    feed.start_over()
    feed.replay([0])
    assert (feed.ledger.hides_salts, feed.state) == (False, COMPLETE)


# Restarts


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_smaller_live_number_is_a_new_engine(number: int) -> None:
    feed = complete_feed(6)
    epoch = feed.epoch
    feed.live(number, RESTARTED[number])
    assert (feed.held, feed.state, feed.replay_from, feed.stats.restarts) == (0, SYNCING, 0, 1)
    assert feed.epoch > epoch
    feed.replay(range(number + 1), RESTARTED)
    assert (feed.state, feed.held_of_other, feed.held) == (COMPLETE, number + 1, 0)


def test_the_last_number_with_other_bytes_is_a_new_engine_and_with_the_same_a_duplicate() -> None:
    feed = complete_feed(6)
    feed.hear([5])
    assert (feed.state, feed.held, feed.stats.duplicates) == (COMPLETE, 6, 2)
    feed.hear([5], RESTARTED)
    assert (feed.state, feed.held, feed.stats.restarts) == (SYNCING, 0, 1)


def test_a_new_engine_that_overtook_the_old_number_is_recognised_by_the_last_frame() -> None:
    feed = complete_feed(6)
    feed.hear([9], RESTARTED)
    assert (feed.replay_from, feed.stats.gaps) == (5, 1)
    feed.replay(range(5, 10), RESTARTED)
    assert (feed.state, feed.held, feed.replay_from, feed.stats.restarts) == (SYNCING, 0, 0, 1)
    feed.replay(range(10), RESTARTED)
    assert (feed.state, feed.held, feed.held_of_other) == (COMPLETE, 0, 10)


def test_an_engine_that_never_published_the_last_frame_is_a_new_one() -> None:
    feed = complete_feed(6)
    feed.hear([9])
    feed.replay([])
    assert (feed.state, feed.held, feed.replay_from, feed.stats.restarts) == (SYNCING, 0, 0, 1)
    feed.replay(range(2), RESTARTED)
    assert (feed.state, feed.held_of_other) == (COMPLETE, 2)


def test_a_new_engine_that_shows_while_a_replay_is_awaited_voids_what_was_held() -> None:
    feed = complete_feed(3)
    feed.hear([5, 6])
    epoch = feed.epoch
    feed.hear([0, 1], RESTARTED)
    assert (feed.state, feed.replay_from, feed.held, feed.stats.restarts) == (SYNCING, 0, 0, 1)
    assert feed.epoch > epoch
    feed.replay([0], RESTARTED)
    assert (feed.state, feed.held_of_other) == (COMPLETE, 2)


def test_a_frame_that_comes_twice_while_a_replay_is_awaited_is_held_once() -> None:
    feed = complete_feed(3)
    feed.hear([5, 5])
    assert (feed.backlog, feed.stats.duplicates, feed.stats.restarts) == (1, 2, 0)


def test_a_held_frame_that_differs_from_the_replayed_one_is_a_new_engine() -> None:
    feed = complete_feed(3)
    feed.hear([4])
    feed.replay([2, 3], whole=False)
    feed.replayed(3, FRAMES[3])
    feed.replayed(4, RESTARTED[4])
    feed.replay_ended()
    feed.settle()
    assert (feed.state, feed.replay_from, feed.held, feed.stats.restarts) == (SYNCING, 0, 0, 1)


# Connections


def test_a_lost_connection_makes_a_feed_stale_and_nothing_is_taken() -> None:
    feed = complete_feed(3)
    feed.hear([5])
    epoch = feed.epoch
    feed.disconnected()
    assert (feed.state, feed.replay_from, feed.held, feed.backlog) == (STALE, None, 3, 0)
    assert feed.epoch > epoch
    feed.hear([3, 4])
    assert (feed.state, feed.held) == (STALE, 3)


def test_a_connection_that_is_back_is_stale_until_the_engine_proves_to_be_the_same() -> None:
    feed = complete_feed(3)
    feed.disconnected()
    feed.reconnected()
    feed.hear([5])
    assert (feed.state, feed.replay_from, feed.held) == (STALE, 2, 3)
    feed.replayed(2, FRAMES[2])
    assert (feed.state, feed.held) == (SYNCING, 3)
    feed.replayed(3, FRAMES[3])
    feed.replayed(4, FRAMES[4])
    feed.replay_ended()
    feed.settle()
    assert (feed.state, feed.held, feed.stats.restarts) == (COMPLETE, 6, 0)


def test_a_partial_feed_that_lost_nothing_with_its_connection_is_as_partial_as_before() -> None:
    feed = Feed()
    feed.replay([2, 3])
    feed.disconnected()
    feed.reconnected()
    feed.replay([3])
    assert (feed.state, feed.replay_from) == (PARTIAL, None)


@pytest.mark.parametrize("numbers", [range(2, 6), []], ids=["other bytes", "fewer frames"])
def test_another_engine_behind_a_new_connection_is_taken_from_its_beginning(numbers: Iterable[int]) -> None:
    feed = complete_feed(3)
    feed.disconnected()
    feed.reconnected()
    feed.replay(numbers, RESTARTED)
    assert (feed.state, feed.replay_from, feed.held, feed.stats.restarts) == (SYNCING, 0, 0, 1)
    feed.replay(range(6), RESTARTED)
    assert (feed.state, feed.held, feed.held_of_other) == (COMPLETE, 0, 6)


def test_a_connection_whose_history_was_truncated_meanwhile_leaves_the_feed_partial() -> None:
    feed = complete_feed(3)
    feed.disconnected()
    feed.reconnected()
    feed.replay([5, 6])
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, None, 0)


def test_a_connection_whose_replay_fails_leaves_the_feed_partial() -> None:
    feed = complete_feed(3)
    feed.disconnected()
    feed.reconnected()
    feed.fail()
    assert (feed.state, feed.held, feed.given_up) == (PARTIAL, 0, True)


def test_a_connection_lost_before_the_first_frame_leaves_nothing_to_prove() -> None:
    feed = Feed()
    feed.disconnected()
    assert feed.state is STALE
    feed.reconnected()
    assert (feed.state, feed.replay_from) == (SYNCING, 0)
    feed.replay(range(2))
    assert (feed.state, feed.held) == (COMPLETE, 2)


# Without replay


def test_without_replay_a_late_start_is_partly_known() -> None:
    feed = Feed(can_replay=False)
    assert (feed.state, feed.replay_from) == (PARTIAL, None)
    feed.hear([3, 4])
    assert (feed.state, feed.stats.gaps, feed.ledger.stats.orphans) == (PARTIAL, 0, 2)


def test_without_replay_an_engine_heard_from_its_first_frame_on_is_known_completely() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0, 1])
    assert (feed.state, feed.replay_from, feed.held) == (COMPLETE, None, 2)


def test_without_replay_a_loss_clears() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0, 1, 3])
    assert (feed.state, feed.replay_from, feed.held, feed.stats.gaps) == (PARTIAL, None, 0, 1)
    feed.live(4, ROOT)
    assert feed.held == 1


def test_without_replay_a_new_engine_is_taken_from_its_first_frame_on() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0, 1, 2])
    feed.hear([1, 2], RESTARTED)
    assert (feed.state, feed.held, feed.held_of_other, feed.stats.restarts) == (PARTIAL, 0, 0, 1)
    feed.hear([0, 1], RESTARTED)
    assert (feed.state, feed.held_of_other, feed.stats.restarts) == (COMPLETE, 2, 2)


def test_without_replay_a_lost_connection_clears() -> None:
    feed = Feed(can_replay=False)
    feed.hear([0, 1, 2])
    feed.disconnected()
    assert (feed.state, feed.held) == (STALE, 3)
    feed.reconnected()
    assert (feed.state, feed.replay_from, feed.held) == (PARTIAL, None, 0)
    feed.live(3, ROOT)
    assert (feed.state, feed.held) == (PARTIAL, 1)


# Frames that cannot be read


@pytest.mark.parametrize(
    ("bad", "malformed", "unreadable"),
    [(b"\xc1", 1, 0), (frame({"type": "BlockRemoved"}, stored([103], [3], parent=102), [7]), 0, 2)],
    ids=["frame", "event"],
)
def test_what_cannot_be_read_may_have_been_a_removal_and_clears(bad: bytes, malformed: int, unreadable: int) -> None:
    feed = complete_feed(3)
    feed.live(3, bad)
    assert (feed.state, feed.held, feed.replay_from) == (PARTIAL, 0, None)
    assert (feed.stats.malformed, feed.stats.unreadable_events) == (malformed, unreadable)
    feed.live(4, ROOT)
    assert (feed.state, feed.held) == (PARTIAL, 1)


def test_an_event_of_an_unknown_type_costs_trust_and_no_blocks() -> None:
    feed = complete_feed(3)
    feed.live(3, frame({"type": "BlockMoved"}, CLEARED, stored([7], PROMPT[:1]), ["BlockMoved", 1]))
    assert (feed.state, feed.held, feed.stats.unreadable_events) == (PARTIAL, 1, 2)
    assert feed.ledger.limits == (limits.unknown_event("BlockMoved"),)
    feed.live(4, frame(CLEARED))
    assert feed.state is PARTIAL  # until another engine is expected
    feed.start_over()
    assert not feed.ledger.limits


def test_what_answers_have_shown_of_drops_stays_while_the_engine_is_the_same() -> None:
    feed = complete_feed(3)
    feed.ledger.drop_more()
    feed.ledger.rules.drop_is_settled = True
    feed.start_over()
    feed.replay(range(3))
    assert (feed.ledger.drops, feed.ledger.rules.drop_is_settled, feed.state) == (True, True, COMPLETE)
    feed.live(0, ROOT)  # another engine
    assert (feed.ledger.drops, feed.ledger.rules.drop_is_settled) == (False, False)


def test_a_stored_block_that_cannot_be_read_is_missing_even_after_a_clear_in_the_same_batch() -> None:
    odd = {**stored([8], [1], parent=7), "block_size": "16"}
    feed = complete_feed(3)
    feed.live(3, frame(odd))
    assert (feed.state, feed.held) == (PARTIAL, 3)
    feed.live(4, frame(CLEARED, stored([7], PROMPT[:1]), odd))
    assert (feed.state, feed.held, feed.stats.unreadable_events) == (PARTIAL, 1, 2)


def test_a_malformed_frame_in_a_replay_leaves_the_feed_partial() -> None:
    feed = Feed()
    feed.replayed(0, b"")
    for _ in range(2):
        feed.replayed(1, ROOT)
        feed.replay_ended()
    assert (feed.state, feed.held) == (PARTIAL, 1)


def test_a_frame_that_could_not_be_applied_clears() -> None:
    feed = complete_feed(3)
    feed.failed_to_apply()
    assert (feed.state, feed.held, feed.stats.malformed) == (PARTIAL, 0, 1)


# Clears


def test_after_a_clear_everything_is_known_again_whatever_was_lost() -> None:
    feed = complete_feed(3)
    feed.live(3, b"\xc1")
    feed.live(4, frame(stored([7], PROMPT[:1]), CLEARED, stored([8], PROMPT[:1])))
    assert (feed.state, feed.held) == (COMPLETE, 1)
    feed.live(5, b"\xc1")
    assert (feed.state, feed.held) == (PARTIAL, 0)


def test_a_clear_in_the_middle_of_a_replay_makes_a_truncated_history_whole() -> None:
    feed = Feed()
    feed.replayed(4, frame(stored([7], [0])))
    feed.replayed(5, frame(CLEARED))
    assert feed.state is SYNCING
    for _ in range(2):
        feed.replayed(6, ROOT)
        feed.replay_ended()
    assert (feed.state, feed.held) == (COMPLETE, 1)


def test_a_clear_that_was_held_empties_the_pod_after_the_frames_that_were_lost() -> None:
    feed = complete_feed(3)
    feed.live(4, frame(CLEARED, timestamp=4))
    feed.live(5, ROOT)
    feed.replay([2, 3])
    assert (feed.state, feed.held, feed.replay_from) == (COMPLETE, 1, None)


def test_after_a_clear_no_history_is_fetched_again() -> None:
    feed = complete_feed(3)
    feed.hear([5])
    feed.fail()
    assert feed.given_up
    feed.live(6, frame(CLEARED))
    assert (feed.state, feed.given_up) == (COMPLETE, False)


# Engines whose events cannot be trusted


def distrust(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(ledger: Ledger, *events: Event) -> None:
        raise UntrustedEvents("its blocks have no parents")

    monkeypatch.setattr(Ledger, "apply", apply)


def test_an_engine_whose_events_cannot_be_trusted_holds_nothing_until_it_restarts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed = complete_feed(3)
    with monkeypatch.context() as patch:
        distrust(patch)
        feed.hear([3])
    assert (feed.state, feed.held, feed.untrusted) == (UNTRUSTED, 0, "its blocks have no parents")
    feed.live(4, frame(CLEARED, stored([7], PROMPT[:1])))
    feed.live(5, b"\xc1")
    assert (feed.state, feed.held, feed.stats.malformed) == (UNTRUSTED, 0, 0)
    feed.hear([0], RESTARTED)
    feed.replay([0], RESTARTED)
    assert (feed.state, feed.held_of_other, feed.untrusted) == (COMPLETE, 1, None)


def test_distrust_outlives_gaps_and_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = complete_feed(3)
    with monkeypatch.context() as patch:
        distrust(patch)
        feed.hear([3])
    feed.hear([6])
    assert feed.replay_from == 3
    feed.replay(range(3, 7))
    feed.disconnected()
    feed.reconnected()
    feed.replay([8, 9])
    assert (feed.state, feed.held, feed.stats.truncated) == (UNTRUSTED, 0, 1)
    feed.disconnected()
    feed.reconnected()
    feed.replay(range(10), RESTARTED)
    feed.replay(range(10), RESTARTED)
    assert (feed.state, feed.held_of_other) == (COMPLETE, 10)


def test_without_replay_distrust_ends_with_the_first_frame_of_a_new_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feed(can_replay=False)
    with monkeypatch.context() as patch:
        distrust(patch)
        feed.hear([0])
    feed.disconnected()
    feed.reconnected()
    feed.hear([4])
    assert feed.state is UNTRUSTED
    feed.disconnected()
    feed.reconnected()
    feed.hear([0, 1], RESTARTED)
    assert (feed.state, feed.held_of_other) == (COMPLETE, 2)


# Heartbeats


def followed(*, frames: int = 3) -> Feed:
    """A feed that has replayed `frames` frames and is complete."""
    feed = Feed()
    feed.replay(range(frames))
    assert feed.state is COMPLETE
    return feed


def test_the_last_frame_alone_proves_that_a_silent_engine_published_nothing() -> None:
    feed = followed()
    assert feed.heartbeat_from == 2
    feed.heartbeat([(2, FRAMES[2])])
    assert (feed.state, feed.replay_from, feed.stats.heartbeats) == (COMPLETE, None, 1)


def test_an_engine_without_frames_proves_it_by_the_bare_end() -> None:
    feed = followed(frames=0)
    assert feed.heartbeat_from == 0
    feed.heartbeat([])
    assert feed.state is COMPLETE
    feed.heartbeat([(0, FRAMES[0])])
    feed.replay([0])
    assert (feed.state, feed.stats.silent_losses, feed.follower.held(PROMPT)) == (COMPLETE, 1, 1)


def test_silent_losses_are_replayed() -> None:
    feed = followed()
    feed.heartbeat([(2, FRAMES[2]), (3, FRAMES[3])])
    assert (feed.state, feed.replay_from) == (SYNCING, 2)
    feed.replay([2, 3])
    assert (feed.state, feed.follower.held(PROMPT)) == (COMPLETE, 4)


@pytest.mark.parametrize("answer", [[], [(2, RESTARTED[2])]], ids=["nothing yet", "other bytes"])
def test_an_engine_that_restarted_in_silence_is_found_out(answer: list[tuple[int, bytes]]) -> None:
    feed = followed()
    feed.heartbeat(answer)
    feed.replay([number for number, _ in answer], RESTARTED)
    assert feed.stats.restarts == 1
    feed.replay(range(3) if answer else [], RESTARTED)
    assert (feed.follower.held(PROMPT), feed.follower.held(OTHER)) == (0, 3 if answer else 0)


def test_an_engine_that_does_not_answer_is_silent_until_it_is_heard_again() -> None:
    feed = followed()
    for _ in range(feed_module.MAX_MISSED_HEARTBEATS):
        assert not feed.is_silent
        feed.heartbeat_missed()
    assert feed.is_silent
    feed.hear([3])
    assert not feed.is_silent
    for _ in range(feed_module.MAX_MISSED_HEARTBEATS):
        feed.heartbeat_missed()
    feed.heartbeat([(3, FRAMES[3])])
    assert not feed.is_silent


def test_no_heartbeat_is_asked_for_where_the_answer_would_say_nothing() -> None:
    assert Feed().heartbeat_from is None  # its first replay is under way
    assert Feed(can_replay=False).heartbeat_from is None
    feed = followed()
    feed.disconnected()
    assert feed.heartbeat_from is None


def test_what_is_known_from_elsewhere_is_a_limit_also_after_a_restart() -> None:
    feed = Feed()
    feed.replay(range(2))
    assert (feed.state, feed.limits) == (COMPLETE, ())
    feed.remarks.note("two ranks, one publisher")
    assert (feed.state, feed.limits) == (PARTIAL, ("two ranks, one publisher",))
    feed.live(0, RESTARTED[0])
    feed.settle()
    feed.replay(range(1), RESTARTED)
    assert (feed.stats.restarts, feed.state, feed.limits) == (1, PARTIAL, ("two ranks, one publisher",))
    feed.remarks.reset()
    assert feed.state is COMPLETE


def test_what_may_be_another_engine_s_is_stale_until_it_is_settled() -> None:
    feed = Feed()
    feed.replay(range(2))
    feed.suspect("port", "the port may be another engine's")
    assert (feed.state, feed.limits) == (STALE, ("the port may be another engine's",))
    feed.suspect("port", None)
    feed.suspect("port", None)
    assert (feed.state, feed.limits) == (COMPLETE, ())


def test_batches_of_another_rank_are_noticed() -> None:
    feed = Feed()
    feed.listed_ranks = frozenset((9, 1))
    feed.replay(range(0))
    for number, rank in enumerate((9, 1, None)):
        feed.live(number, frame(rank=rank))
    assert (feed.state, feed.other_rank) == (COMPLETE, None)
    feed.live(3, frame(rank=0))
    assert feed.state is STALE
    assert feed.other_rank is not None
    assert "from data-parallel rank 0, but it is listed as pod-a" in feed.other_rank
    feed.live(0, frame(rank=9, timestamp=7))
    feed.settle()
    feed.replay(range(1), [frame(rank=9, timestamp=7)])
    assert feed.other_rank is None
    assert feed.state is COMPLETE
