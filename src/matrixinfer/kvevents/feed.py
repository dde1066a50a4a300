"""One engine's feed, without its sockets: frames in, index operations out.

The cursor judges each frame, `transitions` says what follows from that, and the feed does it. The owner of the sockets
fetches what `replay_from` asks for and hands it back. Live frames that come meanwhile are held, within bounds, and
applied in order afterwards, one per `catch_up`, so that a long backlog does not block the event loop.

Engines drop the part of a replay that a slow reader does not take, and may still send the end marker. So a replay that
brought something is followed by another one, from the last frame on, until one brings nothing or live frames take over.

A frame that cannot be read may have reported a removal, and so may an event in it that is not clearly a BlockStored. So
it counts as a loss: the pod is cleared and the feed is partial. An event of an unknown type is a limit of the feed. Whatever was lost, the engine holds nothing after
AllBlocksCleared: from there on the feed is complete again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from matrixinfer.kvevents.counts import UntrustedEvents
from matrixinfer.kvevents.cursor import Cursor, Source, digest
from matrixinfer.kvevents.held import HeldFrames
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.limits import Limits, other_rank
from matrixinfer.kvevents.states import VERDICTS, Action, Fate, FeedState, FeedStats, Input, Knowledge, Phase
from matrixinfer.kvevents.transitions import LIVE_ONLY, WITH_REPLAY
from matrixinfer.kvevents.wire import LONG_FRAME_BYTES, Batch, MalformedFrame, decode, decoding

__all__ = ["FeedState", "FeedStats", "PodFeed"]

MAX_HELD_FRAMES = 20_000
MAX_HELD_BYTES = 256 * 1024 * 1024
REPLAY_ATTEMPTS = 3
"""Replays in a row without progress, after which whoever fetches them calls `replay_failed`."""
MAX_MISSED_HEARTBEATS = 3
"""In a row, after which silence no longer proves that nothing happened."""

_RANK = "rank"
_EMPTYING = frozenset({Action.CLEAR, Action.RESET, Action.START_OVER})
_STALE = (Phase.DISCONNECTED, Phase.PROVING)
_REPLAYING = (Phase.ASKED, Phase.RECEIVING, Phase.PROVING)
_UNTRUSTED = (Knowledge.UNTRUSTED, Knowledge.UNTRUSTED_GIVEN_UP)
_GIVEN_UP = (Knowledge.GIVEN_UP, Knowledge.UNTRUSTED_GIVEN_UP)


class PodFeed:
    """Applies the frames of one publisher to a ledger.

    With `can_replay` false the feed begins with the first frame that comes, and clears the pod on every loss.
    """

    def __init__(self, ledger: Ledger, *, can_replay: bool) -> None:
        self.ledger = ledger
        self.stats = FeedStats()
        self.changes = 0
        """Counts how often anything that is known here may have changed, but for the ledger and the remarks."""
        self.epoch = 0
        """Counts what was asked for: the answer to a replay that was asked for in an earlier epoch is void."""
        self.queue = HeldFrames()
        """Live frames that wait for a replay; for reading."""
        self.remarks = Limits()
        """What is known of the publisher from elsewhere than its events, in words like the limits."""
        self.listed_ranks: frozenset[int] = frozenset()
        """The numbers that the publisher's batches may carry as their rank; empty if that is not known."""
        self._suspicions: dict[str, str] = {}
        self._can_replay = can_replay
        self._tables = WITH_REPLAY if can_replay else LIVE_ONLY
        self._steps = self._tables.steps
        self._phase = Phase.ASKED if can_replay else Phase.FOLLOWING
        self._knowledge = Knowledge.WHOLE if can_replay else Knowledge.PARTIAL
        self._cursor = Cursor(0 if can_replay else None)
        self._distrust = ""
        self._rest: Iterator[None] | None = None
        """What is left to apply of a long frame."""
        self._unanswered = 0  # heartbeats in a row
        self._seen = 0  # frames, of the engine's present run as far as that is known
        self._before = 0  # of these, frames that the engine did not have when it was last asked for them
        self._restart_known = False  # the engine itself has shown that it restarted, since the last frame
        self._keeps_history = False  # the engine has replayed a frame, so it would replay its last one
        self._actions: Mapping[Action, Callable[[], None]] = {
            Action.ASK: self._ask,
            Action.VOID: self._void,
            Action.CLEAR: ledger.clear,
            Action.RESET: self._reset,
            Action.START_OVER: ledger.start_over,
            Action.LOSE: self._cursor.lose,
            Action.REWIND: self._cursor.restart,
            Action.ANSWERED: self._answered,
            Action.MISSED: self._missed,
        }

    # What is known

    @property
    def state(self) -> FeedState:
        """How far the index can be believed now."""
        if self.untrusted is not None:
            return FeedState.UNTRUSTED
        if self._phase in _STALE or self._suspicions:
            return FeedState.STALE
        if self._phase is not Phase.FOLLOWING:
            return FeedState.SYNCING
        is_exact = self.ledger.is_exact and not self.remarks.words and self._knowledge is Knowledge.WHOLE
        return FeedState.COMPLETE if is_exact else FeedState.PARTIAL

    @property
    def untrusted(self) -> str | None:
        """Why the engine's events do not say what it holds; None where they do."""
        return self._distrust if self._knowledge in _UNTRUSTED else None

    @property
    def limits(self) -> tuple[str, ...]:
        """What the events cannot tell, or why they may be another cache's, in plain words that name the remedy."""
        return (*self._suspicions.values(), *self.remarks.words, *self.ledger.limits)

    @property
    def other_rank(self) -> str | None:
        """What is wrong if batches name another rank than the one that the publisher is listed as; None if nothing is."""
        return self._suspicions.get(_RANK)

    @property
    def lacks_history(self) -> bool:
        """Whether the engine may hold blocks whose events were not read."""
        return self._knowledge in (Knowledge.PARTIAL, Knowledge.GIVEN_UP)

    @property
    def is_disconnected(self) -> bool:
        """Whether the connection is lost, or is back and the engine has not proved yet that it is the same."""
        return self._phase in _STALE

    @property
    def given_up(self) -> bool:
        """A replay has failed: the engine's history may be fetched again later."""
        return self._knowledge in _GIVEN_UP and self._phase not in _STALE

    @property
    def is_silent(self) -> bool:
        """Whether the engine no longer answers heartbeats."""
        return self._unanswered >= MAX_MISSED_HEARTBEATS

    @property
    def position(self) -> int | None:
        """The number of the frame that comes next; None where any frame is taken for a beginning."""
        return self._cursor.next

    @property
    def backlog(self) -> int:
        """Live frames held."""
        return len(self.queue)

    # What to ask the engine for

    @property
    def replay_from(self) -> int | None:
        """The number from which frames must be replayed; None while no replay is needed."""
        return self._cursor.replay_from if self._phase in _REPLAYING else None

    @property
    def heartbeat_from(self) -> int | None:
        """The number from which to ask whether anything was lost; None where the answer would say nothing."""
        is_useful = self._can_replay and self._phase is Phase.FOLLOWING and self.untrusted is None
        return self._cursor.replay_from if is_useful and self._cursor.next is not None else None

    # Frames

    def live(self, seq: int, payload: bytes, *, whole: bool = True) -> None:
        """Take a frame from the live socket. Unless `whole`, a long frame may leave something to `go_on` with."""
        self._count_frame(payload)
        if self._unanswered:
            self._unanswered = 0
            self.changes += 1
        self._handle(Source.LIVE, seq, payload, self._step(Input.LIVE_FRAME))
        if whole and self._rest is not None:
            self.finish()

    def replayed(self, seq: int, payload: bytes, *, whole: bool = True) -> None:
        """Take a frame of the replay that was asked for in this epoch; `whole` as for `live`."""
        self._count_frame(payload)
        self._keeps_history = True
        self._handle(Source.REPLAY, seq, payload, self._step(Input.REPLAYED_FRAME))
        if whole and self._rest is not None:
            self.finish()

    def go_on(self) -> bool:
        """Apply the next slice of a long frame. False when nothing is left."""
        rest = self._rest
        if rest is None:
            return False
        is_over = True
        try:
            is_over = next(rest, rest) is rest
        finally:
            if is_over:
                self._rest = None
        return not is_over

    def finish(self) -> None:
        """Apply what is left of a long frame."""
        while self.go_on():
            pass

    @property
    def is_unfinished(self) -> bool:
        """Whether a part of a long frame is still to be applied."""
        return self._rest is not None

    def replay_ended(self) -> None:
        """The replay came to its end marker. `catch_up` is due, unless another replay is asked for."""
        last = self.queue.last
        if self._cursor.lacks_last:
            self._before = self._seen - len(self.queue)
            if self._keeps_history or self._restart_known:
                self._forget_earlier_run()
            self._step(Input.REPLAY_ENDED_UNPROVEN)
        elif self._cursor.next == 0 and self._seen:
            self._step(Input.REPLAY_ENDED_EMPTY)
        elif last is not None and last[0] >= self._cursor.replay_from:
            self._step(Input.REPLAY_ENDED_CONTINUED)
        else:
            self._step(Input.REPLAY_ENDED)

    def replay_broke_off(self) -> None:
        """The replay stopped before its end marker: what is left must be asked for."""
        self._step(Input.REPLAY_BROKE_OFF)

    def replay_failed(self) -> None:
        """The replay has failed: clear, and continue from live frames as partly known. `catch_up` is due."""
        self._step(Input.REPLAY_FAILED)

    def catch_up(self, *, whole: bool = True) -> bool:
        """Apply the next held frame; `whole` as for `live`. False when there is none, or when a replay must come first."""
        if self._phase is not Phase.CATCHING_UP:
            return False
        seq, payload = self.queue.pop()
        self._check_held()
        self._handle(Source.LIVE, seq, payload, Fate.JUDGE)
        if whole and self._rest is not None:
            self.finish()
        return True

    # Heartbeats

    def heartbeat(self, frames: Sequence[tuple[int, bytes]]) -> None:
        """A silent engine was asked for what it has from `heartbeat_from` on, and no live frame came meanwhile.

        The last frame alone, with the bytes that are known, proves that nothing was lost; otherwise a replay is needed.
        """
        self._keeps_history = self._keeps_history or bool(frames)
        if self._cursor.next is not None:
            is_last = self._cursor.is_last([(seq, digest(payload)) for seq, payload in frames])
            self._step(Input.HEARTBEAT_CONFIRMED if is_last else Input.HEARTBEAT_BEHIND)

    def heartbeat_missed(self) -> None:
        """The engine did not answer."""
        self._step(Input.HEARTBEAT_MISSED)

    # Faults and commands

    def disconnected(self) -> None:
        """The connection is lost: nothing is taken until it is back."""
        self._step(Input.DISCONNECTED)

    def reconnected(self) -> None:
        """The connection is back: have the engine prove that it is the same, and replay what was missed."""
        if self._cursor.next is None:
            self._step(Input.RECONNECTED_ASTRAY)
        else:
            self._step(Input.RECONNECTED if self._cursor.next else Input.RECONNECTED_AT_START)

    def engine_restarted(self) -> bool:
        """The engine has shown elsewhere that it is another run. Returns whether `start_over` now makes more of it known."""
        if self._phase in _STALE:
            self._restart_known = True
        elif self._cursor.next == 0:
            self._forget_earlier_run()
            return self.state is FeedState.PARTIAL and not self._seen
        return False

    def start_over(self) -> None:
        """Forget everything and fetch the engine's history from its beginning, where it has a replay endpoint."""
        self._step(Input.STARTED_OVER)

    def purge(self) -> None:
        """What is indexed has turned out untrue, even after a replay: clear it, and go on from live frames."""
        self._step(Input.PURGED)

    def suspect(self, what: str, words: str | None) -> None:
        """What comes may be the events of another cache, as `words` say, so that the index may be wrong; None: no longer."""
        self.changes += 1
        if words is None:
            self._suspicions.pop(what, None)
        else:
            self._suspicions[what] = words

    def failed_to_apply(self) -> None:
        """Applying a frame failed halfway: what the ledger says cannot be trusted."""
        self._step(Input.FAILED_TO_APPLY)

    # The machine

    def _step(self, given: Input) -> Fate:
        """Go where the tables say, act, and return what becomes of the frame at hand."""
        try:
            step = self._steps[self._phase, self._knowledge, given]
        except KeyError:
            step = self._tables.step(self._phase, self._knowledge, given)  # raises, and says what is impossible
        if step is None:
            return Fate.DROP
        self._phase, self._knowledge, counted, actions, fate = step
        self.changes += 1
        for counter in counted:
            setattr(self.stats, counter, getattr(self.stats, counter) + 1)
        if actions:
            if not _EMPTYING.isdisjoint(actions):
                self._rest = None  # of a frame that came before
            for action in actions:
                self._actions[action]()
        if self._phase is Phase.CATCHING_UP:
            self._check_held()
        return fate

    def _check_held(self) -> None:
        if not self.queue:
            self._step(Input.HELD_NONE_LEFT)

    def _handle(self, source: Source, seq: int, payload: bytes, fate: Fate) -> None:
        """Do with a frame what the tables say."""
        while fate is Fate.JUDGE:
            fate = self._step(self._judged(source, seq, payload))
        if fate is Fate.APPLY:
            self._apply(source, seq, payload)
        elif fate is Fate.HOLD:
            self._hold(seq, payload)
        elif fate is Fate.PUT_BACK:
            self.queue.put_back((seq, payload))

    def _judged(self, source: Source, seq: int, payload: bytes) -> Input:
        given = VERDICTS[source, self._cursor.advance(source, seq, digest(payload))]
        return Input.REPLAY_PROOF if given is Input.REPLAY_DUPLICATE and self._cursor.proven else given

    def _hold(self, seq: int, payload: bytes) -> None:
        last = self.queue.last
        if last == (seq, payload):
            self._step(Input.HELD_DUPLICATE)
            return
        if last is not None and seq <= last[0]:
            self._handle(Source.LIVE, seq, payload, self._step(Input.HELD_RESTART))
            return
        self.queue.append((seq, payload))
        if len(self.queue) > MAX_HELD_FRAMES or self.queue.bytes > MAX_HELD_BYTES:
            self._step(Input.HELD_TOO_MANY)

    def _apply(self, source: Source, seq: int, payload: bytes) -> None:
        if self._rest is not None:
            self.finish()
        if seq == 0:
            self._step(Input.FIRST_LIVE if source is Source.LIVE else Input.FIRST_REPLAYED)
        if self._knowledge in _UNTRUSTED:
            return
        if len(payload) > LONG_FRAME_BYTES:
            self._rest = self._in_slices(source, payload)
            return
        try:
            batch = decode(payload)
            if self._admits(source, batch):
                clears = self.ledger.stats.clears
                self.ledger.apply(*batch.events)
                self._applied(batch, clears)
        except (MalformedFrame, UntrustedEvents) as error:
            self._refused(error)

    def _in_slices(self, source: Source, payload: bytes) -> Iterator[None]:
        """Apply a long frame, step by step."""
        try:
            batch = yield from decoding(payload)
            if self._admits(source, batch):
                clears = self.ledger.stats.clears
                yield from self.ledger.applying(batch.events)
                self._applied(batch, clears)
        except (MalformedFrame, UntrustedEvents) as error:
            self._refused(error)

    def _refused(self, error: MalformedFrame | UntrustedEvents) -> None:
        if isinstance(error, UntrustedEvents):
            self._distrust = error.reason
            self._step(Input.DISTRUSTED)
        else:
            self._step(Input.MALFORMED)

    def _admits(self, source: Source, batch: Batch) -> bool:
        """Note what a batch says besides its events. Returns whether these are to be applied."""
        if batch.rank is not None and self.listed_ranks and batch.rank not in self.listed_ranks:
            self.suspect(_RANK, other_rank(batch.rank, self.ledger.pod))
        if source is Source.LIVE:
            self.stats.last_batch_at = batch.timestamp
        for kind in batch.unknown:
            self.stats.unreadable_events += 1
            self.ledger.skip(kind)
        if batch.unreadable > batch.unreadable_stored:
            self.stats.unreadable_events += batch.unreadable
            self._step(Input.UNREADABLE)
            return False
        return True

    def _applied(self, batch: Batch, clears: int) -> None:
        """The events of a batch are in the ledger, which had seen so many clears before."""
        if batch.unreadable:
            self.stats.unreadable_events += batch.unreadable
            self._step(Input.UNREADABLE_STORED)
        elif self._knowledge is not Knowledge.WHOLE and self.ledger.stats.clears > clears:
            self._step(Input.CLEARED)

    def _count_frame(self, payload: bytes) -> None:
        self.stats.frames += 1
        self._seen += 1
        self._restart_known = False
        self.stats.bytes += len(payload)

    def _forget_earlier_run(self) -> None:
        """The engine has restarted: what it did not have is not of its present run."""
        self._seen, self._before = self._seen - self._before, 0

    # Actions

    def _reset(self) -> None:
        self.ledger.reset()
        self.suspect(_RANK, None)

    def _ask(self) -> None:
        self.epoch += 1
        self._cursor.doubt()

    def _void(self) -> None:
        self.epoch += 1
        self.queue.clear()

    def _answered(self) -> None:
        self._unanswered = 0

    def _missed(self) -> None:
        self._unanswered += 1
