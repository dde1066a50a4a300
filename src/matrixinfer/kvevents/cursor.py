"""Sequence numbers to verdicts: what a numbered frame means for the feed.

An engine numbers its batches from 0 at every start. Numbers alone do not tell a replayed duplicate from a restarted
engine, nor a gap from an engine that restarted and overtook the old number. So the cursor knows digests, and every
replay begins with the last frame: the same bytes prove that this is still the same engine.

Live frames and replays come over two connections. A live frame may come after the replay that brought it, but never
after a later live one. So the cursor remembers the last live frame and those that replays brought after it.

                     live                            replay, unproven    replay, proven
    not remembered   RESTART                         DUPLICATE           DUPLICATE
    remembered       DUPLICATE, or RESTART if        DUPLICATE           DUPLICATE
    the last one     … the bytes differ              DUPLICATE, or RESTART if the bytes differ
    the next one     APPLY                           TRUNCATED           APPLY
    greater          GAP                             TRUNCATED           GAP

Before the first frame there is nothing to prove: number 0 is applied, and a replay that begins later is truncated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum

REMEMBERED = 10_000
"""Frames that a live connection may lag behind a replay; engines keep as many by default. Beyond, history is fetched anew."""


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


def verdict(*, source: Source, seq: int, digest: int, expected: int, proven: bool, known: int | None) -> Verdict:
    """What frame `seq` with `digest` means where the number `expected` is next: a pure function, the table above.

    `proven`: this engine is known to have published the frame before that. `known`: the digest that is remembered of
    the frame `seq`, None for none.
    """
    if seq < expected:
        if source is Source.REPLAY and seq != expected - 1:
            return Verdict.DUPLICATE
        return Verdict.DUPLICATE if known == digest else Verdict.RESTART
    if source is Source.REPLAY and not proven and seq > max(0, expected - 1):
        return Verdict.TRUNCATED
    return Verdict.APPLY if seq == expected else Verdict.GAP


class Cursor:
    """The position in a feed: the next number expected, and what is remembered of the frames before it.

    A cursor with a `start` other than 0 takes the frame of that number for a beginning.
    """

    def __init__(self, start: int = 0) -> None:
        self.next = start
        self.proven = start > 0
        """This engine is known to have published the frame before `next`."""
        self._digests: deque[int] = deque(maxlen=REMEMBERED)

    @property
    def replay_from(self) -> int:
        """The number that a replay must begin with: the last one applied."""
        return max(0, self.next - 1)

    @property
    def lacks_last(self) -> bool:
        """Whether a replay that ends whole here comes from an engine that never published what was applied last."""
        return self.next > 0 and not self.proven

    def is_last(self, frames: Sequence[tuple[int, int]]) -> bool:
        """Whether `frames`, pairs of number and digest, are just the last frame applied; none before the first."""
        return list(frames) == ([(self.next - 1, self._digests[-1])] if self._digests else [])

    def advance(self, source: Source, seq: int, digest: int) -> Verdict:
        """The verdict on frame `seq` with `digest`; the cursor moves past a frame to apply.

        A gap leaves the cursor where it is, to be doubted; a restart or a truncated history make it void.
        """
        age = self.next - seq
        known = self._digests[-age] if 0 < age <= len(self._digests) else None
        means = verdict(source=source, seq=seq, digest=digest, expected=self.next, proven=self.proven, known=known)
        if means is Verdict.APPLY:
            if source is Source.LIVE:
                self._digests.clear()
            self._digests.append(digest)
            self.next, self.proven = seq + 1, True
        elif means is Verdict.DUPLICATE:
            self.proven = self.proven or age == 1
            if source is Source.LIVE:
                while len(self._digests) > age:
                    self._digests.popleft()
        return means
