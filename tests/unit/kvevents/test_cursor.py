import pytest

from matrixinfer.kvevents.cursor import Cursor, Source, Verdict, advance, lacks_last

LIVE, REPLAY = Source.LIVE, Source.REPLAY
APPLY, DUPLICATE, GAP = Verdict.APPLY, Verdict.DUPLICATE, Verdict.GAP
RESTART, TRUNCATED = Verdict.RESTART, Verdict.TRUNCATED
START = Cursor()
PROVEN = Cursor(next=5, digest=44, proven=True)
DOUBTED = Cursor(next=5, digest=44, proven=False)


@pytest.mark.parametrize(
    ("cursor", "source", "seq", "digest", "verdict", "after"),
    [
        # any frame is a beginning
        (None, LIVE, 7, 77, APPLY, Cursor(next=8, digest=77, proven=True)),
        (None, REPLAY, 7, 77, APPLY, Cursor(next=8, digest=77, proven=True)),
        # nothing known yet
        (START, LIVE, 0, 1, APPLY, Cursor(next=1, digest=1, proven=True)),
        (START, REPLAY, 0, 1, APPLY, Cursor(next=1, digest=1, proven=True)),
        (START, LIVE, 1, 1, GAP, START),
        (START, REPLAY, 1, 1, TRUNCATED, START),
        # live
        (PROVEN, LIVE, 5, 55, APPLY, Cursor(next=6, digest=55, proven=True)),
        (PROVEN, LIVE, 6, 66, GAP, PROVEN),
        (PROVEN, LIVE, 2**63, 66, GAP, PROVEN),
        (PROVEN, LIVE, 4, 44, DUPLICATE, PROVEN),
        (PROVEN, LIVE, 4, 45, RESTART, PROVEN),
        (PROVEN, LIVE, 3, 44, RESTART, PROVEN),
        (PROVEN, LIVE, 0, 1, RESTART, PROVEN),
        # a replay that has yet to show the last frame
        (DOUBTED, REPLAY, 4, 44, DUPLICATE, PROVEN),
        (DOUBTED, REPLAY, 4, 45, RESTART, DOUBTED),
        (DOUBTED, REPLAY, 3, 1, DUPLICATE, DOUBTED),
        (DOUBTED, REPLAY, 0, 1, DUPLICATE, DOUBTED),
        (DOUBTED, REPLAY, 5, 55, TRUNCATED, DOUBTED),
        (DOUBTED, REPLAY, 9, 99, TRUNCATED, DOUBTED),
        # a replay that has shown it
        (PROVEN, REPLAY, 5, 55, APPLY, Cursor(next=6, digest=55, proven=True)),
        (PROVEN, REPLAY, 6, 66, GAP, PROVEN),
        (PROVEN, REPLAY, 4, 44, DUPLICATE, PROVEN),
        (PROVEN, REPLAY, 4, 45, RESTART, PROVEN),
        (PROVEN, REPLAY, 3, 1, DUPLICATE, PROVEN),
    ],
)
def test_a_numbered_frame_means(
    cursor: Cursor | None, source: Source, seq: int, digest: int, verdict: Verdict, after: Cursor
) -> None:
    assert advance(cursor, source, seq, digest) == (verdict, after)


def test_doubt_leaves_the_position() -> None:
    assert PROVEN.doubted() == DOUBTED


def test_a_replay_begins_with_the_last_frame_applied() -> None:
    assert (START.replay_from, Cursor(next=1, digest=1).replay_from, PROVEN.replay_from) == (0, 0, 4)


def test_an_engine_whose_whole_replay_lacks_the_last_frame_is_another_one() -> None:
    assert lacks_last(DOUBTED)
    assert not lacks_last(PROVEN)
    assert not lacks_last(START)
