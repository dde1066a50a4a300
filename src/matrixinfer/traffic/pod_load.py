"""The load of one pod: its requests in flight, and how long their prompts will take."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from matrixinfer.traffic.speed import Speed

if TYPE_CHECKING:
    from matrixinfer.traffic.load import Charge

READING_SECONDS = 0.1
"""How far the moment that a reading of an engine's gauges describes may be from when it was read."""
_CHANGES_KEPT = 128
_KNOWN_SECONDS = 1.0
_LEAST_EXPECTED_SECONDS = 0.25
_PATIENCE = 1.5
"""An answer is overdue after this many times the time that was expected."""
_MOST_SLOWED = 20.0


class View(NamedTuple):
    """A pod's load now."""

    in_flight: int
    queued_tokens: int
    queue_seconds: float
    """Until the prompts of its requests in flight are computed, as far as is known."""
    rate: float
    """Prompt tokens that it computes per second; less than learnt if an answer is overdue."""


class Counts:
    """The last values of a number, and when it changed."""

    __slots__ = ("_changes",)

    def __init__(self) -> None:
        self._changes: deque[tuple[float, int]] = deque(maxlen=_CHANGES_KEPT)

    def changed(self, now: float, value: int) -> None:
        """The number is `value` from now on. `now` must not decrease."""
        self._changes.append((now, value))

    def most(self, since: float, until: float) -> int:
        """The highest value between two times."""
        most = 0
        for at, value in reversed(self._changes):
            if at <= until and value > most:
                most = value
            if at <= since:
                break
        return most


class PodLoad:
    """Totals over one pod's open charges, and its speed. Every `now` is in seconds and must not decrease."""

    __slots__ = (
        "_assumed",
        "_head_since",
        "_waiting",
        "computed_tokens",
        "counts",
        "in_flight",
        "known",
        "known_until",
        "queued_tokens",
        "queued_work",
        "speed",
    )

    def __init__(self, speed: Speed) -> None:
        self.in_flight = 0
        self.computed_tokens = 0
        self.queued_tokens = 0
        self.queued_work = 0.0
        """Those tokens, each counted by how long it takes (`matrixinfer.scheduler.prefill`)."""
        self.speed = speed
        self.counts = Counts()
        """Requests in flight over time."""
        self.known: View | None = None
        """The view while nothing is queued, so that it need not be made for every decision; valid until `known_until`."""
        self.known_until = float("-inf")
        self._waiting: dict[Charge, float] = {}
        """The requests that await their first byte, in the order in which they were sent, and their work."""
        self._head_since = 0.0
        """When the pod began to compute the first of those."""
        self._assumed: deque[tuple[float, Charge]] = deque()

    def began(self, charge: Charge, tokens: int, work: float, now: float) -> None:
        """A request is sent, with so many tokens to compute, which take as long as `work` tokens at a prompt's start."""
        self.in_flight += 1
        self.known_until = float("-inf")
        self.counts.changed(now, self.in_flight)
        if not tokens:
            return
        rate = self.speed.rate(now)
        ahead = self._seconds(now, rate)[0] if self._waiting else 0.0
        charge.work_until_first_byte = ahead * rate + work
        self.queued_tokens += tokens
        self.queued_work += work
        if not self._waiting:
            self._head_since = now
        self._waiting[charge] = work
        if not charge.streams:  # its first byte comes after its last token
            self._assumed.append((now + ahead + work / rate, charge))

    def computed(self, charge: Charge, tokens: int, now: float) -> None:
        """A request's prompt is computed, or no longer wanted."""
        self.queued_tokens -= tokens
        self.computed_tokens += tokens
        if next(iter(self._waiting), None) is charge:
            self._head_since = now
        self.queued_work -= self._waiting.pop(charge, 0.0)
        if not self._waiting:
            self.queued_work = 0.0  # and no rest of sums

    def ended(self, now: float) -> None:
        """A request is over."""
        self.in_flight -= 1
        self.known_until = float("-inf")
        self.counts.changed(now, self.in_flight)

    def view(self, now: float) -> View:
        """The load now."""
        if self._assumed:
            self._assume(now)
        rate = self.speed.rate(now)
        if not self.queued_tokens:
            self.known, self.known_until = View(self.in_flight, 0, 0.0, rate), now + _KNOWN_SECONDS
            return self.known
        seconds, slowed = self._seconds(now, rate)
        return View(self.in_flight, self.queued_tokens, seconds, rate / slowed)

    def _assume(self, now: float) -> None:
        """Take the prompts of answers that are not streamed as computed once that was expected."""
        while self._assumed and (self._assumed[0][0] <= now or not self._assumed[0][1].awaits_first_byte):
            self._assumed.popleft()[1].assume_computed(now)

    def _seconds(self, now: float, rate: float) -> tuple[float, float]:
        """Seconds until all queued tokens are computed, and by how much the pod is slower than it was.

        The request that has waited longest is being computed, since the one before it was. If it takes much longer than
        expected, so will the others.
        """
        total = self.queued_work / rate
        head = next(iter(self._waiting), None)
        if head is None:
            return total, 1.0
        passed, own = now - self._head_since, self._waiting[head] / rate
        expected = max(own, _LEAST_EXPECTED_SECONDS)
        if passed <= _PATIENCE * expected or not head.streams:
            return total - min(passed, own), 1.0
        slowed = min(passed / (_PATIENCE * expected), _MOST_SLOWED)
        return max(total, expected) * slowed - own, slowed
