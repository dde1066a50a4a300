"""Sequence numbers to verdicts: what a numbered frame means for whoever follows a feed.

An engine numbers its batches from 0 at every start. A number alone does not distinguish a replayed duplicate from a
restarted engine, nor a gap from an engine that restarted and has already passed the old number. So the cursor keeps
digests, and every replay begins with the last frame: the same bytes prove that this is still the same engine.

Live frames and replays come over two connections. A live frame may come after the replay that brought it, but never
after a later live one. So the cursor remembers the last live frame and those that replays brought after it.

                     live                            replay, unproven    replay, proven
    not remembered   RESTART                         DUPLICATE           DUPLICATE
    remembered       DUPLICATE, or RESTART if        DUPLICATE           DUPLICATE
    the last one     … the bytes differ              DUPLICATE, or RESTART if the bytes differ
    the next one     APPLY                           TRUNCATED           APPLY
    greater          GAP                             TRUNCATED           GAP

Before the first frame there is nothing to prove: number 0 is applied, and a replay that begins later is truncated. A
cursor without a position applies any frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum

REMEMBERED = 10_000
"""Frames that a live connection may lag behind a replay; engines keep as many by default. Beyond, it is a restart."""


_SAMPLED_BYTES = 256 * 1024


def digest(payload: bytes) -> int:
    """Tells a frame from another of the same number. A long one counts by its ends; its time stamp is at the beginning."""
    if len(payload) <= _SAMPLED_BYTES:
        return hash(payload)
    return hash((len(payload), payload[: _SAMPLED_BYTES // 2], payload[-_SAMPLED_BYTES // 2 :]))


class QuickEnum(Enum):
    """Members hash by identity. Hashed by name, as in `Enum`, tables would cost every frame some microseconds."""

    __hash__ = object.__hash__


class Source(QuickEnum):
    """Where a frame comes from."""

    LIVE = "live"
    REPLAY = "replay"


class Verdict(QuickEnum):
    """What a frame means."""

    APPLY = "apply"
    """The next one."""
    DUPLICATE = "duplicate"
    """Seen before."""
    GAP = "gap"
    """Frames before it are missing, or this is another engine: a replay shows which."""
    RESTART = "restart"
    """The engine has restarted: all that was known is void."""
    TRUNCATED = "truncated"
    """The engine no longer has the frames before it, and whether it is the same engine is unknown."""


def verdict(*, source: Source, seq: int, digest: int, expected: int, proven: bool, known: int | None) -> Verdict:
    """What frame `seq` with `digest` means where the number `expected` is next: a pure function, the table above.

    `proven`: this engine is known to have published the frame before `expected`. `known`: the digest remembered for
    the frame `seq`; None if there is none.
    """
    if seq < expected:
        if source is Source.REPLAY and seq != expected - 1:
            return Verdict.DUPLICATE
        return Verdict.DUPLICATE if known == digest else Verdict.RESTART
    if source is Source.REPLAY and not proven and seq > max(0, expected - 1):
        return Verdict.TRUNCATED
    return Verdict.APPLY if seq == expected else Verdict.GAP


class Cursor:
    """The position in a feed: the next number expected, and what is remembered about the frames before it."""

    def __init__(self, start: int | None = 0) -> None:
        self.next = start
        """The number expected next; None without a position: the next frame is taken for the beginning."""
        self.proven = bool(start)
        """This engine is known to have published the frame before `next`."""
        self._digests: deque[int] = deque(maxlen=REMEMBERED)

    @property
    def replay_from(self) -> int:
        """The number that a replay must begin with: the last one applied."""
        return max(0, (self.next or 0) - 1)

    @property
    def lacks_last(self) -> bool:
        """Whether a replay that ends whole here comes from an engine that never published the last frame applied."""
        return bool(self.next) and not self.proven

    def is_last(self, frames: Sequence[tuple[int, int]]) -> bool:
        """Whether `frames`, pairs of number and digest, are exactly the last frame applied, or empty before the first."""
        return list(frames) == ([(self.replay_from, self._digests[-1])] if self._digests else [])

    def restart(self) -> None:
        """Expect frame 0 of a new engine."""
        self._go_to(0)

    def lose(self) -> None:
        """Give up the position: the next frame, whichever it is, is taken for the beginning."""
        self._go_to(None)

    def doubt(self) -> None:
        """The engine may be another one, until a replay shows the last frame again."""
        self.proven = False

    def advance(self, source: Source, seq: int, digest: int) -> Verdict:
        """The verdict on frame `seq` with `digest`; the cursor moves past a frame to apply.

        On every other verdict the cursor stays where it is: the caller then calls `doubt`, `restart` or `lose`.
        """
        expected = self.next
        if expected is None:
            self._go_to(seq)
            expected = seq
        age = expected - seq
        known = self._digests[-age] if 0 < age <= len(self._digests) else None
        means = verdict(source=source, seq=seq, digest=digest, expected=expected, proven=self.proven, known=known)
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

    def _go_to(self, start: int | None) -> None:
        self.next, self.proven = start, bool(start)
        self._digests.clear()
