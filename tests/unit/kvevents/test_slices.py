"""Long frames are applied in slices: in the end as at once, and in between as if no more had been published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.kvevents import feed as feed_module
from matrixinfer.kvevents import ledger as ledger_module
from matrixinfer.kvevents import slices as slices_module
from matrixinfer.kvevents import wire
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.slices import PIECE_BLOCKS, WHOLE_BLOCKS, pieces, slices
from matrixinfer.kvevents.wire import BlockRemoved, BlockStored, MalformedFrame, decode, decoding

from .support import CLEARED, MODEL, Follower, frame, removed, stored
from .test_feed_model import BLOCKS, Engine

LONG = 6 * WHOLE_BLOCKS + 7


def follow() -> tuple[PodFeed, Follower]:
    follower = Follower(BLOCKS)
    return PodFeed(follower.ledger, can_replay=False), follower


def chain(first: int, last: int, **fields: Any) -> dict[str, Any]:
    """The blocks [first, last) of one long chain, one token each, named by their positions from 1 on."""
    hashes = list(range(first + 1, last + 1))
    return stored(hashes, hashes, parent=first or None, extra_keys=[None] * len(hashes), **fields)


def steps(feed: PodFeed) -> int:
    """Apply what is left, and count the slices."""
    count = 0
    while feed.go_on():
        count += 1
    return count


def wholly_decoded(payload: bytes) -> wire.Batch:
    """What `decoding` returns."""
    work = decoding(payload)
    while True:
        try:
            next(work)
        except StopIteration as end:
            batch: wire.Batch = end.value
            return batch


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=6))
def test_a_feed_in_slices_ends_where_one_at_once_does(wishes: list[list[int]]) -> None:
    engine = Engine(0, buffered=0)
    (sliced, follower), (at_once, other) = follow(), follow()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_module, "LONG_FRAME_BYTES", 0)
        patch.setattr(slices_module, "PIECE_BLOCKS", 1)
        for batch in wishes:
            seq, payload = engine.publish(batch)
            sliced.live(seq, payload, whole=False)
            steps(sliced)
            at_once.ledger.apply(*decode(payload).events)
            assert follower.index.contents() == other.index.contents()
            assert follower.index.contents().get(MODEL, set()) == engine.truth()
            assert (len(sliced.ledger), sliced.ledger.stats) == (len(at_once.ledger), at_once.ledger.stats)


@given(st.lists(st.sampled_from(["a", "b", "bad", "odd", "no event"])), st.booleans(), st.booleans())
def test_decoding_in_steps_reads_what_decoding_at_once_reads(names: list[str], as_map: bool, as_arrays: bool) -> None:
    known: dict[str, Any] = {
        "a": ["BlockRemoved", [1], "GPU"] if as_arrays else removed([1]),
        "b": ["BlockStored", [1], None, [5], 1, None, "GPU", {"cache_salt": "s"}] if as_arrays else stored([1], [5]),
        "bad": {"type": "BlockStored"},
        "odd": {"type": "Unheard"},
        "no event": 5,
    }
    events = [known[name] for name in names]
    batch = {"ts": 1.0, "events": events, "data_parallel_rank": 3} if as_map else [1.0, events, 3]
    payload = msgspec.msgpack.encode(batch)
    assert wholly_decoded(payload) == decode(payload)


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x91\x01", msgspec.msgpack.encode([1.0, {}, 0]), b"\x92\xca"])
def test_what_is_no_batch_is_refused_in_steps_as_well(payload: bytes) -> None:
    for read in (decode, wholly_decoded):
        with pytest.raises(MalformedFrame):
            read(payload)


def test_a_list_of_too_many_events_is_refused_before_it_is_read() -> None:
    count = wire.MAX_EVENTS + 1
    payload = b"\x92\xcb" + bytes(8) + b"\xdd" + count.to_bytes(4, "big") + b"\x01" * count
    with pytest.raises(MalformedFrame, match="events"):
        wholly_decoded(payload)


def test_an_event_of_more_tokens_than_any_context_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_EVENT_TOKENS", 100)
    batch = wholly_decoded(frame(chain(0, 101), chain(0, 100)))
    assert [len(event.block_hashes) for event in batch.events if isinstance(event, BlockStored)] == [100]
    assert (batch.unreadable, batch.unreadable_stored) == (1, 1)


def test_a_long_event_is_cut_into_children_of_one_another() -> None:
    event = decode(frame(chain(0, LONG))).events[0]
    assert isinstance(event, BlockStored)
    parts: list[BlockStored] = []
    for piece in pieces(event):
        assert isinstance(piece, BlockStored)
        assert len(piece.block_hashes) <= PIECE_BLOCKS
        assert wire.parent_of(piece) == (parts[-1].block_hashes[-1] if parts else None)
        parts.append(piece)
    assert b"".join(wire.tokens_of(piece) or b"" for piece in parts) == wire.tokens_of(event)
    assert [name for piece in parts for name in piece.block_hashes] == list(range(1, LONG + 1))
    assert sum(len(piece.extra_keys or []) for piece in parts) == LONG


@pytest.mark.parametrize("tokens", [[1] * (LONG - 1), [], "text", None])
def test_an_event_that_is_not_of_whole_blocks_is_not_cut(tokens: object) -> None:
    event = decode(frame({**chain(0, LONG), "token_ids": tokens})).events[0]
    assert list(pieces(event)) == [event]


def test_pairs_of_tokens_are_cut_as_well() -> None:
    pairs = [[token, token + 1] for token in range(LONG)]
    event = decode(frame({**chain(0, LONG), "token_ids": pairs})).events[0]
    cut = [wire.pairs_of(piece) for piece in pieces(event) if isinstance(piece, BlockStored)]
    assert len(cut) > 2
    assert sum(len(pair[1]) for pair in cut if pair is not None) == LONG


@pytest.mark.parametrize("order", ["as stored", "last first"])
@pytest.mark.parametrize("singly", [True, False])
def test_a_chain_is_stored_and_removed_in_many_slices(order: str, singly: bool) -> None:
    feed, follower = follow()
    feed.live(0, frame(chain(0, LONG)), whole=False)
    lengths = [follower.total]
    while feed.go_on():
        lengths.append(follower.total)
        assert follower.held(range(1, LONG + 1)) == follower.total  # a prefix
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > LONG // PIECE_BLOCKS
    assert (feed.state, follower.total) == (FeedState.COMPLETE, LONG)
    names: Sequence[int] = range(1, LONG + 1) if order == "as stored" else range(LONG, 0, -1)
    feed.live(1, frame(*([removed([name]) for name in names] if singly else [removed(list(names))])), whole=False)
    lengths = [follower.total]
    while feed.go_on():
        lengths.append(follower.total)
        assert follower.held(range(1, LONG + 1)) == follower.total
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > LONG // PIECE_BLOCKS
    assert (feed.state, follower.total) == (FeedState.COMPLETE, 0)


def test_a_hit_that_is_reported_again_is_no_copy_however_long_it_is() -> None:
    feed, follower = follow()
    for seq in range(2):
        feed.live(seq, frame(chain(0, LONG)))
    feed.live(2, frame(removed(list(range(LONG, 0, -1)))))
    assert follower.total == 0


def test_neighbours_share_a_slice() -> None:
    events = decode(frame(*(stored([name], [name]) for name in range(1, 1001)), CLEARED)).events
    groups = list(slices(events, lambda _: None))
    assert [event for group in groups for event in group] == list(events)
    assert 2 <= len(groups) <= 2 * 1000 // PIECE_BLOCKS + 1


def test_removals_are_joined_only_where_they_are_from_one_place() -> None:
    events = decode(
        frame(removed([1]), removed([2]), removed([3], medium="CPU"), stored([4], [4]), removed([4], medium="CPU"))
    ).events
    (group,) = slices(events, lambda _: None)
    names = [event.block_hashes for event in group if isinstance(event, BlockRemoved)]
    assert names == [[1, 2], [3], [4]]


@pytest.mark.parametrize("interrupt", ["purge", "start_over", "failed_to_apply"])
def test_what_is_left_of_a_frame_is_dropped_when_everything_is_forgotten(interrupt: str) -> None:
    feed, follower = follow()
    feed.live(0, frame(chain(0, LONG)), whole=False)
    for _ in range(5):
        assert feed.go_on()
    assert follower.total
    getattr(feed, interrupt)()
    assert not feed.is_unfinished
    assert not feed.go_on()
    assert follower.total == 0
    feed.live(1, frame(CLEARED, chain(0, 3)))
    assert follower.total == 3


def test_the_next_frame_comes_after_the_whole_of_this_one() -> None:
    feed, follower = follow()
    feed.live(0, frame(chain(0, LONG)), whole=False)
    feed.live(1, frame(removed([LONG])), whole=False)
    assert (follower.total, feed.is_unfinished) == (LONG - 1, False)


def test_a_connection_that_is_lost_meanwhile_loses_nothing_of_the_frame() -> None:
    feed, follower = follow()
    feed.live(0, frame(chain(0, LONG)), whole=False)
    feed.go_on()
    feed.disconnected()
    assert steps(feed) > 2
    assert follower.total == LONG


def test_a_long_frame_that_cannot_be_read_counts_as_a_loss() -> None:
    feed, follower = follow()
    feed.live(0, frame(chain(0, 3)))
    feed.live(1, frame(chain(3, LONG))[:-2], whole=False)
    steps(feed)
    assert (feed.stats.malformed, feed.state, follower.total) == (1, FeedState.PARTIAL, 0)


def test_events_may_prove_untrue_in_the_middle_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_TOKENS", LONG // 2)
    feed, follower = follow()
    feed.live(0, frame(chain(0, LONG)), whole=False)
    assert steps(feed) < LONG // PIECE_BLOCKS
    assert (feed.state, follower.total, feed.is_unfinished) == (FeedState.UNTRUSTED, 0, False)
