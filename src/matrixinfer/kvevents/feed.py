"""One engine's feed, without its sockets: frames in, index operations out.

The cursor says what each frame means; the feed acts on it and says what is known. Whoever owns the sockets fetches
what `replay_from` asks for and hands it back. Live frames that come meanwhile are held, within bounds, and applied in
order afterwards, one per `catch_up`, so that a long backlog need not hold up the loop.

Engines drop what a slow reader does not take of a replay, and may still send the end marker. So a replay that brought
something is followed by another one, from the last frame on, until one brings nothing, or live frames take over.

A frame that cannot be read may have told of a removal, and so may an event in it that is not plainly a BlockStored. So
it counts as a loss: the pod is cleared and the feed is partial. Whatever was lost, the engine holds nothing after
AllBlocksCleared: from there on the feed is complete again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from matrixinfer.kvevents.cursor import Cursor, Source, Verdict
from matrixinfer.kvevents.ledger import Ledger, UntrustedEvents
from matrixinfer.kvevents.wire import AllBlocksCleared, MalformedFrame, decode

MAX_HELD_FRAMES = 20_000
MAX_HELD_BYTES = 256 * 1024 * 1024
MAX_MISSED_HEARTBEATS = 3
"""In a row, after which silence is no proof any more."""


class FeedState(Enum):
    """What is known of the engine's cache."""

    SYNCING = "syncing"
    """Batches are being fetched: what is indexed lacks what they say."""
    COMPLETE = "complete"
    """Every batch since the engine started or was last empty."""
    PARTIAL = "partial"
    """Joined late, lost batches for good, met some that cannot be read, or the layout hides salts or adapters: what is
    indexed and what is cached may differ a little."""
    STALE = "stale"
    """The connection is down, or back but not proven to lead to the same engine: what is indexed may be untrue."""
    UNTRUSTED = "untrusted"
    """The engine's events do not tell what it holds: nothing is indexed until it restarts."""


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
    truncated: int = 0
    """Replays that began too late."""
    replays: int = 0
    overflows: int = 0
    """Times that held frames had to be given up."""
    heartbeats: int = 0
    """Times that the engine was asked, while it was silent, whether anything was lost, and answered."""
    missed_heartbeats: int = 0
    """Times that it did not answer."""
    lost_in_silence: int = 0
    """Times that its answer told of frames that had not come."""
    last_frame_at: float | None = None
    """Unix time in seconds at which the last live frame came."""
    last_batch_at: float | None = None
    """Unix time in seconds, by the engine's clock, of the last live batch applied."""


class PodFeed:
    """Applies the frames of one publisher to a ledger.

    With `can_replay` false the feed begins with whatever comes first and clears the pod on every loss.
    """

    def __init__(self, ledger: Ledger, *, can_replay: bool) -> None:
        self.ledger = ledger
        self.stats = FeedStats()
        self.epoch = 0
        """Counts what was asked for: the answer to a replay that was asked for in an earlier epoch is void."""
        self.untrusted: str | None = None
        """Why the engine's events do not tell what it holds."""
        self._can_replay = can_replay
        self._cursor: Cursor | None = Cursor() if can_replay else None  # None: whatever comes next is a beginning
        self._replaying = can_replay
        self._brought = False  # the replay has brought something
        self._whole = can_replay  # nothing is lost so far
        self._stale = False
        self._given_up = False
        self._unanswered = 0  # heartbeats in a row
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_bytes = 0

    @property
    def state(self) -> FeedState:
        """What is known now."""
        if self.untrusted is not None:
            return FeedState.UNTRUSTED
        if self._stale:
            return FeedState.STALE
        if self._replaying or self._held:
            return FeedState.SYNCING
        is_exact = self._whole and not self.ledger.hides_salts and not self.ledger.hides_adapters
        return FeedState.COMPLETE if is_exact else FeedState.PARTIAL

    @property
    def replay_from(self) -> int | None:
        """The number from which frames must be replayed, while they must be."""
        return self._cursor.replay_from if self._replaying and self._cursor is not None else None

    @property
    def given_up(self) -> bool:
        """A replay could not be had: the engine's history may be worth another try later."""
        return self._given_up and not self._stale

    @property
    def heartbeat_from(self) -> int | None:
        """The number from which to ask whether anything was lost; None where that cannot be told or is known."""
        if self._cursor is None or not self._can_replay or self._replaying or self._held or self._stale:
            return None
        return None if self.untrusted is not None else self._cursor.replay_from

    @property
    def is_silent(self) -> bool:
        """Whether the engine does not even answer heartbeats any more."""
        return self._unanswered >= MAX_MISSED_HEARTBEATS

    @property
    def backlog(self) -> int:
        """Live frames held."""
        return len(self._held)

    # Frames

    def live(self, seq: int, payload: bytes) -> None:
        """A frame from the live socket."""
        self._count(payload)
        self._unanswered = 0
        if self._replaying or self._held:
            self._hold(seq, payload)
        elif not self._stale:  # else it is left over from the lost connection, or the replay will bring it
            self._take(Source.LIVE, seq, payload)

    def replayed(self, seq: int, payload: bytes) -> None:
        """A frame of the replay that was asked for in this epoch."""
        self._count(payload)
        if self._replaying:
            self._take(Source.REPLAY, seq, payload)

    def replay_ended(self) -> None:
        """The replay came to its end marker. `catch_up` is due, unless another replay is asked for."""
        if self._cursor is None or not self._replaying:
            return
        self.stats.replays += 1
        if self._cursor.lacks_last:
            self._restarted()
        elif self._brought and not self._is_continued(self._cursor):
            self._ask()
        else:
            self._replaying = False
            if self._cursor.next == 0 and self.stats.frames:
                self._whole = False  # a new engine, or one that keeps no history

    def replay_broke_off(self) -> None:
        """The replay stopped before its end marker: what is left must be asked for."""
        if self._replaying:
            self._ask()

    def replay_failed(self) -> None:
        """The replay cannot be had: clear, and go on from live as partly known. `catch_up` is due."""
        if self._replaying:
            self._replaying = False
            self._give_up()

    def catch_up(self) -> bool:
        """Apply the next held frame. False when there is none, or when a replay must come first."""
        if self._replaying or not self._held:
            return False
        seq, payload = self._held.popleft()
        self._held_bytes -= len(payload)
        self._take(Source.LIVE, seq, payload)
        return True

    # Heartbeat

    def heartbeat(self, frames: Sequence[tuple[int, bytes]]) -> None:
        """A silent engine was asked for what it has from `heartbeat_from` on, and nothing came live meanwhile.

        The last frame alone, with the bytes known of it, proves that nothing was lost; anything else asks for a replay.
        """
        if self._cursor is None:
            return
        self.stats.heartbeats += 1
        self._unanswered = 0
        if not self._cursor.is_last([(seq, hash(payload)) for seq, payload in frames]):
            self.stats.lost_in_silence += 1
            self._ask()

    def heartbeat_missed(self) -> None:
        """The engine did not answer."""
        self.stats.missed_heartbeats += 1
        self._unanswered += 1

    # Faults

    def disconnected(self) -> None:
        """The connection is lost: nothing is taken until it is back."""
        self._void()
        self._stale = True

    def reconnected(self) -> None:
        """The connection is back: have the engine prove that it is the same, and replay what was missed."""
        self._void()
        if self._cursor is None or not self._can_replay:
            self.start_over()
        else:
            self._stale = self._cursor.next > 0
            self._ask()

    def start_over(self) -> None:
        """Forget everything and fetch the engine's history from its beginning, where that can be had."""
        self._void()
        self._unanswered = 0
        self._lose()
        self.ledger.reset()
        self._given_up = False
        if self._can_replay:
            self._cursor = Cursor()
            self._whole = True
            self._ask()

    def purge(self) -> None:
        """What is indexed has turned out untrue, also after a replay: clear it, and go on from live as partly known."""
        self._void()
        self._lose()
        self._given_up = False

    def spoiled(self) -> None:
        """Applying a frame broke off in the middle: what the ledger says cannot be trusted."""
        self.stats.malformed += 1
        self._forget()

    # What a frame means

    def _count(self, payload: bytes) -> None:
        self.stats.frames += 1
        self.stats.bytes += len(payload)

    def _take(self, source: Source, seq: int, payload: bytes) -> None:
        if self._cursor is None:
            self._cursor = Cursor(seq)
        verdict = self._cursor.advance(source, seq, hash(payload))
        if verdict is Verdict.APPLY:
            self._brought |= source is Source.REPLAY
            self._apply(source, seq, payload)
        elif verdict is Verdict.DUPLICATE:
            self.stats.duplicates += 1
            self._stale = self._stale and not self._cursor.proven
        elif verdict is Verdict.TRUNCATED:
            self.stats.truncated += 1
            self._lose()
            self._take(source, seq, payload)
        elif verdict is Verdict.RESTART:
            self._restarted()
            if not self._can_replay:  # else the replay brings it once more, or it is older than all that can be had
                self._take(source, seq, payload)
        else:
            self.stats.gaps += 1
            self._missed()
            self._postpone(source, seq, payload)

    def _missed(self) -> None:
        """Frames are missing."""
        if self._can_replay:
            self._ask()
        else:
            self._lose()

    def _postpone(self, source: Source, seq: int, payload: bytes) -> None:
        """Take a live frame when what is missing before it has come; a replay will bring its frame once more."""
        if source is Source.REPLAY:
            return
        if self._replaying:
            self._held.appendleft((seq, payload))
            self._held_bytes += len(payload)
        else:
            self._take(source, seq, payload)

    def _apply(self, source: Source, seq: int, payload: bytes) -> None:
        if seq == 0:
            self._complete()
            if source is Source.LIVE:
                self.untrusted = None  # no engine publishes it twice
        if self.untrusted is not None:
            return
        try:
            batch = decode(payload)
        except MalformedFrame:
            self.stats.malformed += 1
            self._forget()
            return
        if source is Source.LIVE:
            self.stats.last_batch_at = batch.timestamp
        if batch.unreadable > batch.unreadable_stored:
            self.stats.unreadable_events += batch.unreadable
            self._forget()
            return
        try:
            self.ledger.apply(*batch.events)
        except UntrustedEvents as error:
            self.untrusted = error.reason
            self.ledger.clear()
            return
        if batch.unreadable:
            self.stats.unreadable_events += batch.unreadable
            self._whole = False  # even after a clear, which may come before what was not read
        elif not self._whole and any(isinstance(event, AllBlocksCleared) for event in batch.events):
            self._complete()

    # What is known

    def _hold(self, seq: int, payload: bytes) -> None:
        if self._held:
            last, bytes_ = self._held[-1]
            if (seq, payload) == (last, bytes_):
                self.stats.duplicates += 1
                return
            if seq <= last:
                self._restarted()
        self._held.append((seq, payload))
        self._held_bytes += len(payload)
        if len(self._held) > MAX_HELD_FRAMES or self._held_bytes > MAX_HELD_BYTES:
            self.stats.overflows += 1
            self._void()
            self._give_up()

    def _ask(self) -> None:
        """Ask for a replay from the last frame on, whose bytes prove that it is the same engine's."""
        self.epoch += 1
        self._replaying, self._brought = True, False
        if self._cursor is not None:
            self._cursor.proven = False

    def _is_continued(self, cursor: Cursor) -> bool:
        """Whether live frames are held that reach as far as the replay: what follows them comes, or shows as a gap."""
        return bool(self._held) and self._held[-1][0] >= cursor.replay_from

    def _void(self) -> None:
        """Drop the replay under way and what waits for it."""
        self.epoch += 1
        self._replaying = False
        self._held.clear()
        self._held_bytes = 0

    def _restarted(self) -> None:
        """The engine is a new one."""
        self.stats.restarts += 1
        self.untrusted = None
        self.start_over()

    def _give_up(self) -> None:
        """What is missing is not to be had for now."""
        self._lose()
        self._given_up = True

    def _lose(self) -> None:
        """The place in the feed is lost for good: go on with whatever comes next."""
        self._forget()
        self._stale = False
        self._cursor = None

    def _complete(self) -> None:
        """From here on everything is known: there is no history left to try for."""
        self._whole, self._given_up = True, False

    def _forget(self) -> None:
        """What is indexed may be untrue: clear it."""
        self.ledger.clear()
        self._whole = False
