import pytest

from matrixinfer.kvevents import cursor as cursor_module
from matrixinfer.kvevents.cursor import Cursor, Source, Verdict

LIVE, REPLAY = Source.LIVE, Source.REPLAY
APPLY, DUPLICATE, GAP = Verdict.APPLY, Verdict.DUPLICATE, Verdict.GAP
RESTART, TRUNCATED = Verdict.RESTART, Verdict.TRUNCATED


def cursor_at(upto: int, *, live: int, proven: bool = True) -> Cursor:
    """A cursor that has taken frames 0 to `upto`, with digests 100, 101, …; the last live one was `live`."""
    cursor = Cursor()
    for seq in range(upto + 1):
        assert cursor.advance(LIVE if seq == live else REPLAY, seq, 100 + seq) is APPLY
    cursor.proven = proven
    return cursor


def test_a_cursor_that_begins_anywhere_takes_the_frame_there() -> None:
    cursor = Cursor(7)
    assert cursor.advance(REPLAY, 7, 1) is APPLY
    assert (cursor.next, cursor.replay_from) == (8, 7)


@pytest.mark.parametrize(
    ("source", "seq", "verdict"), [(LIVE, 0, APPLY), (REPLAY, 0, APPLY), (LIVE, 1, GAP), (REPLAY, 1, TRUNCATED)]
)
def test_what_the_first_frame_of_an_unknown_engine_means(source: Source, seq: int, verdict: Verdict) -> None:
    cursor = Cursor()
    assert cursor.advance(source, seq, 1) is verdict
    assert cursor.next == (verdict is APPLY)


@pytest.mark.parametrize(
    ("proven", "source", "seq", "digest", "verdict"),
    [
        (True, LIVE, 7, 107, APPLY),
        (True, LIVE, 8, 108, GAP),
        (True, LIVE, 2**63, 1, GAP),
        # the last one
        (True, LIVE, 6, 106, DUPLICATE),
        (True, LIVE, 6, 1, RESTART),
        # brought by a replay after the last live one
        (True, LIVE, 5, 105, DUPLICATE),
        (True, LIVE, 5, 1, RESTART),
        # before the last live one
        (True, LIVE, 4, 104, DUPLICATE),
        (True, LIVE, 3, 103, RESTART),
        (True, LIVE, 0, 100, RESTART),
        # a replay that has yet to show the last frame
        (False, REPLAY, 6, 106, DUPLICATE),
        (False, REPLAY, 6, 1, RESTART),
        (False, REPLAY, 5, 1, DUPLICATE),
        (False, REPLAY, 7, 107, TRUNCATED),
        (False, REPLAY, 9, 109, TRUNCATED),
        # a replay that has shown it
        (True, REPLAY, 7, 107, APPLY),
        (True, REPLAY, 8, 108, GAP),
        (True, REPLAY, 6, 106, DUPLICATE),
        (True, REPLAY, 6, 1, RESTART),
        (True, REPLAY, 3, 1, DUPLICATE),
    ],
)
def test_a_numbered_frame_means(proven: bool, source: Source, seq: int, digest: int, verdict: Verdict) -> None:
    cursor = cursor_at(6, live=4, proven=proven)
    assert cursor.advance(source, seq, digest) is verdict
    assert cursor.next == (8 if verdict is APPLY else 7)


def test_the_last_frame_proves_the_engine() -> None:
    cursor = cursor_at(6, live=4, proven=False)
    assert cursor.lacks_last
    cursor.advance(REPLAY, 5, 105)
    assert cursor.lacks_last
    cursor.advance(REPLAY, 6, 106)
    assert not cursor.lacks_last
    assert not Cursor().lacks_last


def test_live_frames_never_go_back() -> None:
    cursor = cursor_at(6, live=3)
    assert [cursor.advance(LIVE, seq, 100 + seq) for seq in (4, 5, 5, 4)] == [DUPLICATE, DUPLICATE, DUPLICATE, RESTART]


def test_no_more_frames_are_remembered_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor_module, "REMEMBERED", 2)
    assert cursor_at(6, live=0).advance(LIVE, 5, 105) is DUPLICATE
    assert cursor_at(6, live=0).advance(LIVE, 4, 104) is RESTART
