"""Sequence numbers to verdicts: a pure function that says what a numbered frame means for the feed.

An engine numbers its batches from 0 at every start. Numbers alone do not tell a replayed duplicate from a restarted
engine, nor a gap from an engine that restarted and overtook the old number. So the cursor knows a digest of the last
frame, and every replay begins with that frame: the same bytes prove that this is still the same engine.

                     live                      replay, unproven          replay, proven
    smaller          RESTART                   DUPLICATE                 DUPLICATE
    the last one     DUPLICATE, or RESTART if the bytes differ
    the next one     APPLY                     TRUNCATED                 APPLY
    greater          GAP                       TRUNCATED                 GAP

Before the first frame there is nothing to prove: number 0 is applied, and a replay that begins later is truncated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Source(Enum):
    """Where a frame comes from."""

    LIVE = "live"
    REPLAY = "replay"


class Verdict(Enum):
    """What a frame means."""

    APPLY = "apply"
    """The next one."""
    DUPLICATE = "duplicate"
    """Seen before."""
    GAP = "gap"
    """Frames before it are missing, or this is another engine: a replay will tell."""
    RESTART = "restart"
    """The engine started anew: whatever was known is void."""
    TRUNCATED = "truncated"
    """What came before is not to be had any more, and whether this is the same engine cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The position in a feed: the next number expected, and the digest of the frame before it."""

    next: int = 0
    digest: int | None = None
    """None before the first frame."""
    proven: bool = False
    """This engine is known to have published the frame before `next`."""

    @property
    def replay_from(self) -> int:
        """The number that a replay must begin with: the last one applied."""
        return max(0, self.next - 1)

    def doubted(self) -> Cursor:
        """The same position, to be proven anew: after a gap or on a new connection."""
        return replace(self, proven=False)


def advance(cursor: Cursor | None, source: Source, seq: int, digest: int) -> tuple[Verdict, Cursor]:
    """The verdict on frame `seq` with `digest`, and the cursor after it.

    Without a cursor any frame is a beginning. A gap leaves the cursor in doubt, a restart or a truncated history void:
    whoever asks for a replay says so.
    """
    if cursor is None:
        return Verdict.APPLY, Cursor(next=seq + 1, digest=digest, proven=True)
    if seq == cursor.next - 1:
        if digest != cursor.digest:
            return Verdict.RESTART, cursor
        return Verdict.DUPLICATE, replace(cursor, proven=True)
    if seq < cursor.next:  # a publisher never repeats itself; a replay may
        return (Verdict.RESTART if source is Source.LIVE else Verdict.DUPLICATE), cursor
    if source is Source.REPLAY and not cursor.proven and seq > cursor.replay_from:
        return Verdict.TRUNCATED, cursor
    if seq > cursor.next:
        return Verdict.GAP, cursor
    return Verdict.APPLY, Cursor(next=seq + 1, digest=digest, proven=True)


def lacks_last(cursor: Cursor) -> bool:
    """Whether a replay that ends whole here comes from an engine that never published what was applied last."""
    return cursor.next > 0 and not cursor.proven
