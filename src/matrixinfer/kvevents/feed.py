"""One engine's feed, without its sockets: frames in, index operations out.

The feed decides what each frame means and what must be replayed; whoever owns the sockets asks `replay_from`, fetches,
and hands the frames back. Live frames that arrive meanwhile are held, within bounds, and applied in order afterwards.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from matrixinfer.kvevents.cursor import Cursor, Source, Verdict, advance
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import MalformedFrame, decode

MAX_HELD_FRAMES = 20_000
MAX_HELD_BYTES = 256 * 1024 * 1024


class FeedState(Enum):
    """How much of the engine's history the ledger has seen."""

    SYNCING = "syncing"
    """History is being fetched; what is indexed so far is true, but not all."""
    COMPLETE = "complete"
    """Every batch since the engine started."""
    PARTIAL = "partial"
    """Joined late, lost frames that could not be replayed, or met frames that could not be read."""
    STALE = "stale"
    """The connection is down; what is indexed may have changed."""


@dataclass(slots=True, kw_only=True)
class FeedStats:
    """Counts since the feed began."""

    frames: int = 0
    bytes: int = 0
    malformed: int = 0
    """Frames that are no batch, or that could not be applied."""
    wrong_topic: int = 0
    """Frames that came under another topic than the configured one."""
    unreadable_events: int = 0
    duplicates: int = 0
    gaps: int = 0
    restarts: int = 0
    replays: int = 0
    overflows: int = 0
    """Times that held frames had to be given up."""


class PodFeed:
    """Applies the frames of one publisher to a ledger.

    With `can_replay` false the feed starts from whatever comes first and clears the pod on every loss.
    """

    def __init__(self, ledger: Ledger, *, can_replay: bool) -> None:
        self.ledger = ledger
        self.stats = FeedStats()
        self.state = FeedState.SYNCING if can_replay else FeedState.PARTIAL
        self.replay_from: int | None = 0 if can_replay else None
        """The number from which frames must be replayed, while they must be."""
        self.epoch = 0
        """Counts the times that the feed started over; a replay asked for in an earlier epoch is void."""
        self.given_up = False
        """A replay could not be had: the engine's history may be worth another try later."""
        self._can_replay = can_replay
        self._cursor: Cursor | None = None  # None: whatever comes next is taken
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_bytes = 0

    def live(self, seq: int, payload: bytes) -> None:
        """A frame from the live socket."""
        self._count(payload)
        if self.state is FeedState.STALE:
            return  # left over from the lost connection, or covered by starting over
        if self.replay_from is None:
            self._take(Source.LIVE, seq, payload)
        else:
            self._hold(seq, payload)

    def replayed(self, seq: int, payload: bytes) -> None:
        """A frame of the replay that `replay_from` asked for. Once that or the epoch changes, the replay's rest is void."""
        self._count(payload)
        if self.replay_from is not None:
            self._take(Source.REPLAY, seq, payload)

    def replay_ended(self) -> None:
        """The replay came to its end marker: apply what was held."""
        if self.replay_from is None:
            return
        self.stats.replays += 1
        if self._cursor is None:
            self._cursor = Cursor()  # nothing published yet
        self._release()
        if self.replay_from is None and self.state is FeedState.SYNCING:
            self.state = FeedState.COMPLETE

    def replay_broke_off(self) -> None:
        """The replay stopped before its end marker: what is left must be fetched from there."""
        if self.replay_from is not None and self._cursor is not None:
            self.replay_from = self._cursor.next

    def replay_failed(self) -> None:
        """The replay cannot be had: clear, and go on from live as partly known."""
        if self.replay_from is None:
            return
        self.given_up = True
        self._lose()
        self._release()

    def spoiled(self) -> None:
        """Applying a frame broke off in the middle: what the ledger says cannot be trusted."""
        self.stats.malformed += 1
        self.state = FeedState.PARTIAL
        self.ledger.clear()

    def disconnected(self) -> None:
        """The connection is lost: nothing is taken until the feed starts over."""
        self._void()
        self.state = FeedState.STALE

    def start_over(self) -> None:
        """Forget everything and fetch the engine's history from its beginning, where that can be had.

        Also due after a new connection: what was missed, and whether this is the same engine, is not known.
        """
        self._void()
        self._lose()
        if self._can_replay:
            self.state = FeedState.SYNCING
            self.replay_from = 0

    def _count(self, payload: bytes) -> None:
        self.stats.frames += 1
        self.stats.bytes += len(payload)

    def _take(self, source: Source, seq: int, payload: bytes) -> None:
        digest = hash(payload)
        if self._cursor is None:
            if seq:
                self.state = FeedState.PARTIAL  # what came before is not to be had
            self._apply(payload, Cursor(next=seq + 1, digest=digest))
            return
        verdict, after = advance(self._cursor, source, seq, digest)
        if verdict is Verdict.APPLY:
            self._apply(payload, after)
        elif verdict is Verdict.DUPLICATE:
            self.stats.duplicates += 1
        elif verdict is Verdict.RESTART:
            self.stats.restarts += 1
            self.start_over()
            if self.replay_from is not None and source is Source.LIVE:
                self._hold(seq, payload)
            elif source is Source.LIVE:
                self._take(source, seq, payload)
        else:
            self.stats.gaps += 1
            self._gap(source, seq, payload, self._cursor.next)

    def _gap(self, source: Source, seq: int, payload: bytes, missing: int) -> None:
        """Frames from number `missing` on did not come before this one."""
        if source is Source.LIVE and self._can_replay:
            if self.state is FeedState.COMPLETE:
                self.state = FeedState.SYNCING
            self.replay_from = missing
            self._hold(seq, payload)
        elif self.replay_from is not None and missing > self.replay_from:
            self.replay_from = missing  # a hole: engines drop frames of a long replay, and have them still
        else:
            self._lose()  # the engine has them no more
            self._take(source, seq, payload)

    def _apply(self, payload: bytes, after: Cursor) -> None:
        self._cursor = after
        try:
            batch = decode(payload)
        except MalformedFrame:
            self.stats.malformed += 1
            self.state = FeedState.PARTIAL
            return
        if batch.unreadable:
            self.stats.unreadable_events += batch.unreadable
            self.state = FeedState.PARTIAL
        for event in batch.events:
            self.ledger.apply(event)

    def _hold(self, seq: int, payload: bytes) -> None:
        if self._held and seq <= self._held[-1][0]:  # the engine restarted while its replay was waited for
            self.stats.restarts += 1
            self.start_over()
        self._held.append((seq, payload))
        self._held_bytes += len(payload)
        if len(self._held) > MAX_HELD_FRAMES or self._held_bytes > MAX_HELD_BYTES:
            self.stats.overflows += 1
            self.replay_failed()

    def _release(self) -> None:
        """Apply the held frames as live ones, but those that the replay has covered."""
        held, self._held, self._held_bytes = self._held, deque(), 0
        self.replay_from = None
        for seq, payload in held:
            if self.replay_from is not None:
                self._hold(seq, payload)
            elif self._cursor is not None and seq < self._cursor.next:
                self.stats.duplicates += 1
            else:
                self._take(Source.LIVE, seq, payload)

    def _void(self) -> None:
        """Drop the replay under way and what waits for it."""
        self.epoch += 1
        self.replay_from = None
        self.given_up = False
        self._held.clear()
        self._held_bytes = 0

    def _lose(self) -> None:
        """Something is missing for good: forget everything and take whatever comes next, as partly known."""
        self.ledger.clear()
        self.state = FeedState.PARTIAL
        self._cursor = None
