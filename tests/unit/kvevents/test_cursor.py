import pytest

from matrixinfer.kvevents.cursor import Cursor, Source, Verdict, advance

LIVE, REPLAY = Source.LIVE, Source.REPLAY
AT_5 = Cursor(next=5, digest=44)


@pytest.mark.parametrize(
    ("cursor", "source", "seq", "digest", "verdict"),
    [
        (Cursor(), LIVE, 0, 1, Verdict.APPLY),
        (Cursor(), REPLAY, 0, 1, Verdict.APPLY),
        (Cursor(), LIVE, 1, 1, Verdict.GAP),
        (AT_5, LIVE, 5, 55, Verdict.APPLY),
        (AT_5, REPLAY, 5, 44, Verdict.APPLY),
        (AT_5, LIVE, 6, 66, Verdict.GAP),
        (AT_5, REPLAY, 2**63, 66, Verdict.GAP),
        (AT_5, LIVE, 4, 44, Verdict.DUPLICATE),
        (AT_5, REPLAY, 4, 44, Verdict.DUPLICATE),
        (AT_5, LIVE, 4, 45, Verdict.RESTART),
        (AT_5, REPLAY, 4, 45, Verdict.RESTART),
        (Cursor(next=5), LIVE, 4, 45, Verdict.DUPLICATE),
        (AT_5, LIVE, 3, 44, Verdict.RESTART),
        (AT_5, LIVE, 0, 1, Verdict.RESTART),
        (AT_5, REPLAY, 3, 1, Verdict.DUPLICATE),
        (AT_5, REPLAY, 0, 1, Verdict.DUPLICATE),
    ],
)
def test_a_numbered_frame_means(cursor: Cursor, source: Source, seq: int, digest: int, verdict: Verdict) -> None:
    after = Cursor(next=seq + 1, digest=digest) if verdict is Verdict.APPLY else cursor
    assert advance(cursor, source, seq, digest) == (verdict, after)
