"""Sequence numbers to verdicts: a pure function that says what a numbered frame means for the feed.

An engine numbers its batches from 0 at every start. Numbers alone do not tell a replayed duplicate from a restarted
engine, so the cursor also knows a digest of the last frame, and is told where a frame comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Frames before it are missing; the cursor stays where it is."""
    RESTART = "restart"
    """The engine started anew: whatever was known is void; the cursor stays where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The position in a feed: the next number expected, and the digest of the frame before it."""

    next: int = 0
    digest: int | None = None


def advance(cursor: Cursor, source: Source, seq: int, digest: int) -> tuple[Verdict, Cursor]:
    """The verdict on frame `seq` with `digest`, and the cursor after it."""
    if seq == cursor.next:
        return Verdict.APPLY, Cursor(next=seq + 1, digest=digest)
    if seq > cursor.next:
        return Verdict.GAP, cursor
    if seq == cursor.next - 1:
        same = cursor.digest is None or digest == cursor.digest
        return (Verdict.DUPLICATE if same else Verdict.RESTART), cursor
    # A publisher never repeats itself, so a smaller live number is a new engine; a replay may overlap what is known.
    return (Verdict.RESTART if source is Source.LIVE else Verdict.DUPLICATE), cursor
