"""Whether engines find in their caches what the index predicts, and publish what they must have stored.

**By answers.** Where an answer reports how many prompt tokens the engine found in its cache, that is compared with the
prediction: between its value when the pod was chosen and when the answer began, as blocks evicted while the request
waited are no fault. The events of those evictions may come after the answer, so fewer is judged `SETTLE_SECONDS` later,
and the reports after it wait for that. Fewer means that the index claims blocks that are not there: an engine lost them without an event,
or events were lost unnoticed. After `RUN` such answers in a row the endpoint's blocks are cleared and its history is
replayed; if that does not help, they are cleared and built up from live events alone. Every further attempt waits twice
as long, and the endpoint is doubted meanwhile. More than predicted is no fault: requests of other gateways, or blocks
whose events are on their way.

An engine may also reuse less than its events say without any fault in the index: with kinds of attention that its
events do not show. So every answer moves the share of the prediction that the endpoint is given credit for (`reuse`).
Once answers have reported less again and again the feed gets a limit, and while some of the prediction is reused the
endpoint is indexed again no more than twice: there is nothing to heal.

**By counters.** Where answers report nothing, the engine's own counters of tokens looked up and found serve instead,
less sharply: the hits counted between two readings must cover what was predicted for the requests sent and answered in
between. While the engine has not yet counted even the prompts of those requests, nothing follows.

**By what is stored.** An engine that computes a prompt stores its new blocks and publishes events about them. After
`RUN` requests in a row whose last block is still not indexed some seconds later, the feed is doubted until one is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias

import structlog

from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.reuse import Reuse

Outcome: TypeAlias = Literal["exact", "more", "fewer", "evicted"]
Window: TypeAlias = Literal["covered", "short", "uncounted"]

RUN = 3
"""Answers in a row with fewer cached tokens than predicted after which an endpoint is indexed again; and requests in a
row that stored nothing after which it is doubted."""
SETTLE_SECONDS = 1.0
"""Time that the events of an eviction may take, from the end of the answer that reports less for it."""
STORED_WITHIN_SECONDS = 5.0
"""Time that events may take to report a prompt's blocks, from the end of its answer."""
WINDOW_SECONDS = 5.0
"""Shortest time between two readings of an engine's counters that are compared."""
_FIRST_PAUSE_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 600.0
_MAX_PREDICTED = 10_000
_MAX_UNSETTLED = 256
_HEALS = 2
"""Times that an endpoint is indexed again, by replay and from live events, before its reuse is taken for what it is."""

log = structlog.get_logger(__name__)


class Resync(Protocol):
    """Clears the indexed blocks of an endpoint, and replays its history (`replay`) or not."""

    def __call__(self, name: str, *, replay: bool) -> None:
        """Returns at once."""
        ...


class Lookups(NamedTuple):
    """Prompt tokens found in a cache, and those looked up (None where that is not reported)."""

    hits: int
    queries: int | None


class _Report(NamedTuple):
    """An answer's report that is judged later. `least` gives what is left of the prediction then, and is called once."""

    due: float
    least: Callable[[], int]
    most: int
    found: int


@dataclass(slots=True)
class _Endpoint:
    reports: bool = False
    """It has reported cached tokens before, so an answer without a number means 0."""
    streak: int = 0
    found: int = 0
    """Most tokens that an answer of this streak found in the cache."""
    reuse: Reuse = field(default_factory=Reuse)
    heals: int = 0
    """How often it was indexed again since its answers last agreed for long."""
    not_before: float = float("-inf")
    pause: float = _FIRST_PAUSE_SECONDS
    replays: bool = True
    """Whether the next attempt replays its history; every second one does."""
    unsettled: deque[_Report] = field(default_factory=deque)
    """Reports that are judged later, in the order in which they came; at most `_MAX_UNSETTLED`."""
    awaited: Callable[[], bool] | None = None
    """Returns whether a block that a request must have stored is indexed; called from `awaited_until` on."""
    awaited_until: float = 0.0
    missed: int = 0
    """Requests in a row whose stored block never came."""
    counted: Lookups | None = None
    """The engine's own counters at the last reading."""
    counted_at: float = float("inf")
    predicted: list[tuple[float, Lookups]] = field(default_factory=list)
    """Start of each answer to a request sent since then, and its predicted hit; at most `_MAX_PREDICTED`."""

    @property
    def is_partial(self) -> bool:
        """Its answers have shown again and again that a part of the prediction is reused: the index is no worse than that."""
        return self.reuse.is_short and self.found > 0


class Drift:
    """Judges every endpoint. `clock` gives seconds and never goes back.

    `limits` is told whether an endpoint has reused less than its events say again and again, with every change.
    """

    def __init__(
        self,
        metrics: Metrics,
        resync: Resync,
        clock: Callable[[], float],
        limits: Callable[[str, bool], None] = lambda name, is_less: None,
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._resync = resync
        self._clock = clock
        self._endpoints: dict[str, _Endpoint] = {}

    def __len__(self) -> int:
        """Endpoints remembered."""
        return len(self._endpoints)

    def now(self) -> float:
        """The time, in seconds."""
        return self._clock()

    def doubts(self, name: str) -> bool:
        """Whether its answers have lately contradicted the index, or its events left out its requests."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            return False
        if endpoint.unsettled:
            self._settle_due(name, endpoint)
        if endpoint.awaited is not None and self._clock() >= endpoint.awaited_until:
            self._settle(name, endpoint, is_stored=endpoint.awaited())
        return (endpoint.streak >= RUN and not endpoint.is_partial) or endpoint.missed >= RUN

    def reuse(self, name: str) -> float:
        """Share of its predicted hits that it really reuses, at most 1."""
        endpoint = self._endpoints.get(name)
        return 1.0 if endpoint is None else endpoint.reuse.share(self._clock())

    def reuses_less(self, name: str) -> bool:
        """Whether its answers have reported less than predicted again and again."""
        endpoint = self._endpoints.get(name)
        return endpoint is not None and endpoint.reuse.is_short

    def observed(self, name: str, *, predicted: int, cached: int | None) -> None:
        """An answer reports `cached` tokens, but its endpoint's events are followed elsewhere, and nothing can be healed here."""
        endpoint = self._of(name)
        if cached is not None or endpoint.reports:
            endpoint.reports = True
            self._observe(name, endpoint, predicted, cached or 0)

    def reported(self, name: str, *, least: int, most: int, cached: int | None) -> None:
        """An answer of the endpoint reports `cached` tokens, or no number, which stands for 0 or for an engine that never does.

        The index predicted `most` tokens when the endpoint was chosen, and `least` when the answer began.
        """
        self._take(name, lambda: least, most=most, cached=cached, is_settled=True)

    def suspected(self, name: str, *, least: Callable[[], int], most: int, cached: int | None) -> None:
        """Like `reported`, but `least` says later what is left of the prediction. It is called exactly once."""
        self._take(name, least, most=most, cached=cached, is_settled=False)

    def began(self, name: str, *, sent_at: float, least: int, tokens: int) -> None:
        """An answer begins whose request must have found `least` of its `tokens` in the cache."""
        endpoint = self._of(name)
        if least and sent_at >= endpoint.counted_at and len(endpoint.predicted) < _MAX_PREDICTED:
            endpoint.predicted.append((self._clock(), Lookups(least, tokens)))

    def measured(self, name: str, counted: Lookups, *, began_at: float) -> None:
        """The engine's counters since its start were read, between `began_at` and now."""
        endpoint, now = self._of(name), self._clock()
        self._settle_due(name, endpoint)
        before = endpoint.counted
        if before is not None and counted.hits >= before.hits:
            if began_at < endpoint.counted_at + WINDOW_SECONDS:
                return
            predicted = [each for at, each in endpoint.predicted if at <= began_at]
            if predicted:
                least = sum(each.hits for each in predicted)
                self._weigh(name, endpoint, _window(before, counted, predicted), least, counted.hits - before.hits)
        endpoint.counted, endpoint.counted_at = counted, now
        endpoint.predicted.clear()

    def _weigh(self, name: str, endpoint: _Endpoint, window: Window, least: int, found: int) -> None:
        self._metrics.drift_window(name, window)
        if not endpoint.reports and window != "uncounted":
            self._observe(name, endpoint, least, found)
            self._count(name, endpoint, is_fewer=window == "short", found=found)

    def awaits(self, name: str, is_stored: Callable[[], bool]) -> None:
        """The endpoint has computed a prompt with a block that was not indexed. One block at a time is awaited."""
        self.doubts(name)
        endpoint = self._of(name)
        if endpoint.awaited is None:
            endpoint.awaited, endpoint.awaited_until = is_stored, self._clock() + STORED_WITHIN_SECONDS

    def forget(self, name: str) -> None:
        """The endpoint has gone."""
        endpoint = self._endpoints.pop(name, None)
        for report in () if endpoint is None else endpoint.unsettled:
            report.least()

    def _take(self, name: str, least: Callable[[], int], *, most: int, cached: int | None, is_settled: bool) -> None:
        endpoint = self._of(name)
        if cached is None and not endpoint.reports:
            least()
            return
        endpoint.reports = True
        self._settle_due(name, endpoint)
        report = _Report(self._clock() + SETTLE_SECONDS, least, most, cached or 0)
        if is_settled and not endpoint.unsettled:
            self._judge(name, endpoint, report)
            return
        endpoint.unsettled.append(report)
        self._settle_due(name, endpoint)
        if len(endpoint.unsettled) > _MAX_UNSETTLED:
            self._judge(name, endpoint, endpoint.unsettled.popleft())

    def _settle_due(self, name: str, endpoint: _Endpoint) -> None:
        now = self._clock()
        while endpoint.unsettled and endpoint.unsettled[0].due <= now:
            self._judge(name, endpoint, endpoint.unsettled.popleft())

    def _judge(self, name: str, endpoint: _Endpoint, report: _Report) -> None:
        least, most, found = report.least(), report.most, report.found
        outcome = _outcome(least, most, found)
        self._metrics.drift(name, outcome, min(max(found, least), most), found)
        self._observe(name, endpoint, least, found)
        self._count(name, endpoint, is_fewer=outcome == "fewer", found=found)

    def _observe(self, name: str, endpoint: _Endpoint, least: int, found: int) -> None:
        reuse, was_short = endpoint.reuse, endpoint.reuse.is_short
        reuse.observe(least, found, self._clock())
        if reuse.is_short and not was_short:
            log.warning("kv_reuse_short", endpoint=name, reuse=round(reuse.share(self._clock()), 2))
        elif was_short and not reuse.is_short:
            endpoint.heals = 0
        if reuse.is_short or was_short:  # every time, as a restart of the engine clears the limit
            self._limits(name, reuse.is_short)

    def _count(self, name: str, endpoint: _Endpoint, *, is_fewer: bool, found: int) -> None:
        endpoint.streak = endpoint.streak + 1 if is_fewer else 0
        endpoint.found = max(endpoint.found, found) if is_fewer else 0
        if endpoint.is_partial and endpoint.heals >= _HEALS:
            endpoint.streak = 0  # that is how the engine is
        if endpoint.streak >= RUN and self._clock() >= endpoint.not_before:
            self._heal(name, endpoint)

    def _of(self, name: str) -> _Endpoint:
        return self._endpoints.setdefault(name, _Endpoint())

    def _settle(self, name: str, endpoint: _Endpoint, *, is_stored: bool) -> None:
        endpoint.awaited = None
        endpoint.missed = 0 if is_stored else endpoint.missed + 1
        if endpoint.missed == RUN:
            log.warning("kv_events_missed", endpoint=name)

    def _heal(self, name: str, endpoint: _Endpoint) -> None:
        log.warning("kv_drift_detected", endpoint=name, replay=endpoint.replays)
        self._metrics.resynced(name)
        now = self._clock()
        if now > endpoint.not_before + 10 * endpoint.pause:  # it has behaved for a long time
            endpoint.pause, endpoint.replays = _FIRST_PAUSE_SECONDS, True
        self._resync(name, replay=endpoint.replays)
        endpoint.replays = not endpoint.replays
        endpoint.not_before = now + endpoint.pause
        endpoint.pause = min(2 * endpoint.pause, _LONGEST_PAUSE_SECONDS)
        endpoint.streak = endpoint.found = 0
        endpoint.heals += 1
        endpoint.reuse.start_over()


def _outcome(least: int, most: int, cached: int) -> Outcome:
    if cached < least:
        return "fewer"
    if cached > most:
        return "more"
    return "exact" if least == most else "evicted"


def _window(before: Lookups, now: Lookups, predicted: Sequence[Lookups]) -> Window:
    """Compare the growth of an engine's counters with the hits predicted in the same time."""
    looked_up = None if before.queries is None or now.queries is None else now.queries - before.queries
    if looked_up is not None and looked_up < sum(each.queries or 0 for each in predicted):
        return "uncounted"
    return "short" if now.hits - before.hits < sum(each.hits for each in predicted) else "covered"
