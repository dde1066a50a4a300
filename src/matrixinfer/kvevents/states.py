"""The states of a feed, what happens to it, and what it does about that. `transitions` says when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from matrixinfer.kvevents.cursor import QuickEnum, Source, Verdict


class FeedState(QuickEnum):
    """How far the index can be believed about the engine's cache."""

    SYNCING = "syncing"
    """Batches are being fetched: the index lacks what they say."""
    COMPLETE = "complete"
    """Every batch since the engine started or was last empty is applied."""
    PARTIAL = "partial"
    """The feed joined late, lost batches for good or met unreadable ones, or the layout hides salts or adapters: the
    index and the cache may differ a little."""
    STALE = "stale"
    """The connection is down, or back but not proven to lead to the same engine: the index may be wrong."""
    UNTRUSTED = "untrusted"
    """The engine's events do not say what it holds: nothing is indexed until it restarts."""


SETTLED = (FeedState.COMPLETE, FeedState.PARTIAL)
"""States in which what is indexed is true."""


@dataclass(slots=True, kw_only=True)
class FeedStats:
    """Counts since the feed began."""

    frames: int = 0
    bytes: int = 0
    malformed: int = 0
    """Frames that do not hold a batch, or could not be applied."""
    wrong_topic: int = 0
    """Frames under another topic than the configured one."""
    unreadable_events: int = 0
    duplicates: int = 0
    gaps: int = 0
    restarts: int = 0
    truncated: int = 0
    """Replays that began after the first frame missing."""
    replays: int = 0
    """Replays that came to their end."""
    overflows: int = 0
    """Times that held frames were dropped because there were too many."""
    heartbeats: int = 0
    """Answers of a silent engine that was asked whether anything was lost."""
    missed_heartbeats: int = 0
    """Times that it did not answer."""
    silent_losses: int = 0
    """Answers that showed frames which had not come."""
    last_frame_at: float | None = None
    """Unix time in seconds at which the last live frame came."""
    last_batch_at: float | None = None
    """Unix time in seconds, by the engine's clock, of the last live batch applied."""


class Phase(QuickEnum):
    """What happens to frames."""

    FOLLOWING = "following"
    """Live frames are applied as they come."""
    CATCHING_UP = "catching up"
    """A replay is over: the live frames held meanwhile are applied in order, and new ones queue behind them."""
    ASKED = "asked"
    """A replay is wanted or under way, and has brought nothing new so far. Live frames are held."""
    RECEIVING = "receiving"
    """The replay has brought something, so that its end must be confirmed. Live frames are held."""
    PROVING = "proving"
    """The connection is back. A replay must show first that the engine is the same. Live frames are held."""
    DISCONNECTED = "disconnected"
    """The connection is down. Whatever comes is dropped: it is left over from the lost connection."""


class Knowledge(QuickEnum):
    """How much of the engine's cache the frames so far account for."""

    WHOLE = "whole"
    """All of it, up to the frame applied last."""
    PARTIAL = "partial"
    """Something is missing for good."""
    GIVEN_UP = "given up"
    """Something is missing, and its replay failed: another try later may bring it."""
    UNTRUSTED = "untrusted"
    """Nothing: the events do not say what the engine holds."""
    UNTRUSTED_GIVEN_UP = "untrusted, given up"
    """Nothing, as before, and another replay may be tried later."""


class Input(QuickEnum):
    """What happens to a feed."""

    # A frame comes
    LIVE_FRAME = "live frame"
    REPLAYED_FRAME = "replayed frame"
    # The cursor's verdict on a live frame, when its turn has come
    LIVE_NEXT = "live next"
    LIVE_DUPLICATE = "live duplicate"
    LIVE_GAP = "live gap"
    LIVE_RESTART = "live restart"
    # The queue's verdict on a live frame that is to be held
    HELD_DUPLICATE = "held duplicate"
    HELD_RESTART = "held restart"  # its number is smaller than that of the one before
    HELD_TOO_MANY = "held too many"
    HELD_NONE_LEFT = "held none left"
    # The cursor's verdict on a replayed frame
    REPLAY_NEXT = "replay next"
    REPLAY_DUPLICATE = "replay duplicate"
    REPLAY_PROOF = "replay proof"  # a duplicate, and the last frame has been shown: the engine is the same
    REPLAY_GAP = "replay gap"
    REPLAY_RESTART = "replay restart"
    REPLAY_TRUNCATED = "replay truncated"
    # The replay is over
    REPLAY_ENDED = "replay ended"
    REPLAY_ENDED_CONTINUED = "replay ended, continued"  # live frames are held that reach as far as the replay
    REPLAY_ENDED_EMPTY = "replay ended, empty"  # by an engine that is known to have published
    REPLAY_ENDED_UNPROVEN = "replay ended, unproven"  # the last frame was not in it: this is another engine
    REPLAY_BROKE_OFF = "replay broke off"
    REPLAY_FAILED = "replay failed"
    # What an applied frame holds
    FIRST_LIVE = "first live"  # it is the engine's first frame
    FIRST_REPLAYED = "first replayed"
    CLEARED = "cleared"
    MALFORMED = "malformed"
    UNREADABLE = "unreadable"  # an event that may have been a removal
    UNREADABLE_STORED = "unreadable stored"
    DISTRUSTED = "distrusted"
    FAILED_TO_APPLY = "failed to apply"
    # Heartbeats
    HEARTBEAT_CONFIRMED = "heartbeat confirmed"
    HEARTBEAT_BEHIND = "heartbeat behind"  # the engine has published more than has come, or is another one
    HEARTBEAT_MISSED = "heartbeat missed"
    # Connections and commands
    DISCONNECTED = "disconnected"
    RECONNECTED = "reconnected"  # with a last frame that the engine can be asked to show
    RECONNECTED_AT_START = "reconnected at start"  # before the first frame: there is nothing to prove
    RECONNECTED_ASTRAY = "reconnected astray"  # without a position
    STARTED_OVER = "started over"
    PURGED = "purged"


VERDICTS: Mapping[tuple[Source, Verdict], Input] = MappingProxyType(
    {
        (Source.LIVE, Verdict.APPLY): Input.LIVE_NEXT,
        (Source.LIVE, Verdict.DUPLICATE): Input.LIVE_DUPLICATE,
        (Source.LIVE, Verdict.GAP): Input.LIVE_GAP,
        (Source.LIVE, Verdict.RESTART): Input.LIVE_RESTART,
        (Source.REPLAY, Verdict.APPLY): Input.REPLAY_NEXT,
        (Source.REPLAY, Verdict.DUPLICATE): Input.REPLAY_DUPLICATE,
        (Source.REPLAY, Verdict.GAP): Input.REPLAY_GAP,
        (Source.REPLAY, Verdict.RESTART): Input.REPLAY_RESTART,
        (Source.REPLAY, Verdict.TRUNCATED): Input.REPLAY_TRUNCATED,
    }
)
"""The cursor calls no live frame truncated."""

COUNTED: Mapping[Input, tuple[str, ...]] = MappingProxyType(
    {
        Input.LIVE_DUPLICATE: ("duplicates",),
        Input.LIVE_GAP: ("gaps",),
        Input.LIVE_RESTART: ("restarts",),
        Input.HELD_DUPLICATE: ("duplicates",),
        Input.HELD_RESTART: ("restarts",),
        Input.HELD_TOO_MANY: ("overflows",),
        Input.REPLAY_DUPLICATE: ("duplicates",),
        Input.REPLAY_PROOF: ("duplicates",),
        Input.REPLAY_GAP: ("gaps",),
        Input.REPLAY_RESTART: ("restarts",),
        Input.REPLAY_TRUNCATED: ("truncated",),
        Input.REPLAY_ENDED: ("replays",),
        Input.REPLAY_ENDED_CONTINUED: ("replays",),
        Input.REPLAY_ENDED_EMPTY: ("replays",),
        Input.REPLAY_ENDED_UNPROVEN: ("replays", "restarts"),
        Input.MALFORMED: ("malformed",),
        Input.FAILED_TO_APPLY: ("malformed",),
        Input.HEARTBEAT_CONFIRMED: ("heartbeats",),
        Input.HEARTBEAT_BEHIND: ("heartbeats", "silent_losses"),
        Input.HEARTBEAT_MISSED: ("missed_heartbeats",),
    }
)
"""The fields of `FeedStats` that count an input, where it is not ignored."""


class Action(QuickEnum):
    """What the feed does, besides what becomes of a frame."""

    ASK = "ask"
    """Ask for a replay from the last frame on, whose bytes prove that it comes from the same engine."""
    VOID = "void"
    """Drop the frames held; the answer to a replay under way is void."""
    CLEAR = "clear"
    """Clear what is indexed."""
    RESET = "reset"
    """Clear what is indexed, and forget what is known about the engine's layout."""
    START_OVER = "start over"
    """Reset, but keep what answers have shown of the engine: it is the same one."""
    LOSE = "lose"
    """Give up the position: the next frame, whichever it is, is taken for a beginning."""
    REWIND = "rewind"
    """Expect frame 0."""
    ANSWERED = "answered"
    """The engine is not silent."""
    MISSED = "missed"
    """The engine did not answer once more."""


class Fate(Enum):
    """What becomes of the frame at hand."""

    DROP = "drop"
    JUDGE = "judge"
    """Have the cursor judge it; its verdict is the next input."""
    APPLY = "apply"
    HOLD = "hold"
    """Queue it behind the frames held."""
    PUT_BACK = "put back"
    """Queue it before the frames held."""
