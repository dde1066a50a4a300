"""One publisher's feed for operators: frames in, readable lines out, and a summary at any time."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.feedtools.describe import Line, describe, listed, plural, shown, tallied
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.counts import UntrustedEvents
from matrixinfer.kvevents.cursor import Cursor, Source, Verdict
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import AllBlocksCleared, BlockStored, Event, MalformedFrame, decode

_MAX_PLACES = 16
"""Most media and groups kept for the summary; real engines have a few."""
_REMARKS = {
    "orphans": "ignored, its parent was never seen",
    "misfits": "ignored, its tokens do not fit its blocks",
    "other_attention": "ignored, not full attention",
    "unknown_removed": "never seen",
}
"""The remark on an event that raises a count of `LedgerStats`."""


@dataclass(slots=True, kw_only=True)
class Summary:
    """Totals of a feed. Blocks are engine blocks."""

    frames: int = 0
    events: int = 0
    blocks: int = 0
    """Held now, as far as the events show."""
    block_size: int | None = None
    """Tokens per block; None before the first was stored."""
    salts_visible: bool | None = None
    media: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    gaps: int = 0
    missing: int = 0
    """Frames in those gaps."""
    restarts: int = 0
    orphans: int = 0
    """Blocks dropped because their parent was never seen."""
    misfits: int = 0
    """Events whose tokens do not fit their blocks."""
    unreadable_frames: int = 0
    unreadable_events: int = 0
    wrong_frames: int = 0
    """Messages that are not frames."""
    other_topic: int = 0
    """Frames under another topic than the requested one."""
    untrusted: str | None = None
    """Why the events cannot be trusted."""

    def __str__(self) -> str:
        """A few readable lines."""
        return "\n  ".join(filter(None, [self._counts(), self._layout(), self._troubles()]))

    def _counts(self) -> str:
        blocks = plural(self.blocks, "block") + (f" of {self.block_size} tokens" if self.block_size else "")
        return f"{plural(self.frames, 'frame')}, {plural(self.events, 'event')}; {blocks} held now"

    def _layout(self) -> str:
        if self.salts_visible is None:
            return ""
        salts = "visible" if self.salts_visible else "hidden by the layout: salted prompts cannot be matched"
        groups = ("group " if len(self.groups) == 1 else "groups ") + listed([str(group) for group in self.groups])
        return f"on {listed(self.media)}; {groups}; salts {salts}"

    def _troubles(self) -> str:
        troubles = tallied(
            (self.gaps, "gap"),
            (self.missing, "missing frame"),
            (self.restarts, "restart"),
            (self.orphans, "orphan block"),
            (self.misfits, "misfit event"),
            (self.unreadable_frames, "unreadable frame"),
            (self.unreadable_events, "unreadable event"),
            (self.wrong_frames, "wrong frame"),
            (self.other_topic, "other-topic frame"),
        )
        return "; ".join(troubles + [f"not trusted: {self.untrusted}"] * (self.untrusted is not None))


class FeedView:
    """Applies one publisher's frames as the gateway does, and describes them.

    At a gap or a restart the view forgets the blocks held, as it does not know what was removed in between.
    """

    def __init__(self, *, topic: str | None = None, with_tokens: bool = False) -> None:
        self._topic = topic
        self._with_tokens = with_tokens
        self._ledger = Ledger(pod="", model="", blocks=TokenBlockProcessor(), index=MemoryIndex())
        self._cursor = Cursor(None)
        self._seen = Summary()

    def frame(self, seq: int, topic: str | None, payload: bytes) -> Iterator[Line]:
        """Take a frame, in order. `topic` is None for a replayed frame, as replays do not carry it."""
        if self._topic is not None and topic not in (None, self._topic):
            self._seen.other_topic += 1
            if self._seen.other_topic == 1:
                yield Line(kind="wrong", seq=seq, words=f"another topic: `{shown(topic or '')}` (shown once)")
            return
        self._seen.frames += 1
        if not (yield from self._in_sequence(seq, payload)):
            return
        try:
            batch = decode(payload)
        except MalformedFrame:
            self._seen.unreadable_frames += 1
            yield Line(kind="unreadable", seq=seq, words=f"unreadable frame of {plural(len(payload), 'byte')}")
            return
        for event in batch.events:
            self._seen.events += 1
            line = describe(event, seq=seq, time=batch.timestamp, with_tokens=self._with_tokens)
            yield self._remarked(line, self._apply(event))
        unread = batch.unreadable + len(batch.unknown)
        if unread:
            self._seen.unreadable_events += unread
            kinds = ", ".join(sorted({shown(kind) for kind in batch.unknown})[:_MAX_PLACES])
            words = plural(unread, "unreadable event") + (f", of unknown types: {kinds}" if kinds else "")
            yield Line(kind="unreadable", seq=seq, words=words, details={"events": unread})

    def wrong(self, parts: list[bytes]) -> Line:
        """Take a message that is not a frame."""
        self._seen.wrong_frames += 1
        sizes = [len(part) for part in parts]
        words = f"a message of {plural(len(parts), 'part')} that is not a frame (sizes {listed(list(map(str, sizes)))})"
        return Line(kind="wrong", words=words, details={"sizes": sizes})

    def summary(self) -> Summary:
        """The totals so far."""
        stats = self._ledger.stats
        return replace(
            self._seen,
            blocks=len(self._ledger),
            block_size=self._ledger.block_size,
            orphans=stats.orphans,
            misfits=stats.misfits,
        )

    def _in_sequence(self, seq: int, payload: bytes) -> Generator[Line, None, bool]:
        """Lines for what the frame's number shows. False for a frame seen before, whose events do not count."""
        digest = hash(payload)
        if self._cursor.next is None and seq:
            yield Line(kind="joined", seq=seq, words="the first frame seen: blocks stored before it are unknown")
        means = self._cursor.advance(Source.LIVE, seq, digest)
        if means is Verdict.DUPLICATE:
            yield Line(kind="duplicate", seq=seq, words="seen before: ignored")
            return False
        if means is Verdict.RESTART:
            self._ledger.clear()
            self._seen.untrusted = None
            self._seen.restarts += 1
            yield Line(kind="restart", seq=seq, words="the engine has restarted: nothing is held")
            self._cursor.restart()
            means = self._cursor.advance(Source.LIVE, seq, digest)
        expected = self._cursor.next
        if means is Verdict.GAP and expected is not None:
            self._ledger.clear()
            self._seen.gaps += 1
            self._seen.missing += seq - expected
            which = f"frame {expected} is" if seq == expected + 1 else f"frames {expected} to {seq - 1} are"
            details = {"first": expected, "last": seq - 1}
            yield Line(kind="gap", seq=seq, words=f"{which} missing: the blocks held are unknown", details=details)
            self._cursor.lose()
            self._cursor.advance(Source.LIVE, seq, digest)
        return True

    def _apply(self, event: Event) -> str | None:
        """Apply one event; returns a remark if something was wrong with it."""
        seen, stats = self._seen, self._ledger.stats
        if not isinstance(event, AllBlocksCleared):
            _note(seen.media, shown(event.medium or "GPU"))
            _note(seen.groups, event.group_idx or 0)
        if seen.untrusted is not None:
            return None
        before = {name: getattr(stats, name) for name in _REMARKS}
        try:
            self._ledger.apply(event)
        except UntrustedEvents as error:
            self._ledger.clear()
            seen.untrusted = error.reason
            return f"not trusted: {error.reason}"
        if isinstance(event, BlockStored):
            seen.salts_visible = not self._ledger.hides_salts
        return next((words for name, words in _REMARKS.items() if getattr(stats, name) != before[name]), None)

    def _remarked(self, line: Line, remark: str | None) -> Line:
        if remark is None:
            return line
        details = {**line.details, "remark": remark}
        return Line(kind=line.kind, seq=line.seq, time=line.time, words=f"{line.words} ({remark})", details=details)


def _note(seen: list[Any], place: object) -> None:
    if place not in seen and len(seen) < _MAX_PLACES:
        seen.append(place)
