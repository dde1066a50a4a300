"""Decides whether to ask a server that has failed: a circuit breaker as a pure state machine.

closed ──consecutive failures──> open ──pause is over──> half-open ──answer──> closed
                                  ^                          └──────failure──> open, for twice as long
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

State: TypeAlias = Literal["closed", "open", "half-open"]

FAILURES = 5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0


class Circuit:
    """Opens after `failures` consecutive failures. `clock` returns seconds and is monotonic."""

    def __init__(self, clock: Callable[[], float], *, failures: int = FAILURES) -> None:
        self._clock = clock
        self._max_failures = failures
        self._failures = 0
        self._pause = FIRST_PAUSE_SECONDS
        self._until: float | None = None  # None: closed
        self._probing = False

    @property
    def state(self) -> State:
        """The current state."""
        if self._until is None:
            return "closed"
        return "open" if self._clock() < self._until else "half-open"

    def admits(self) -> bool:
        """Whether to ask now. When half-open, admits one request at a time, which must report its outcome."""
        state = self.state
        if state == "half-open" and not self._probing:
            self._probing = True
            return True
        return state == "closed"

    def succeeded(self) -> None:
        """Report that the server answered."""
        self._failures, self._pause, self._until, self._probing = 0, FIRST_PAUSE_SECONDS, None, False

    def failed(self) -> None:
        """Report that the server did not answer, or not in time."""
        if self._until is not None:
            if self._probing:
                self._probing = False
                self._open(min(2 * self._pause, LONGEST_PAUSE_SECONDS))
            return
        self._failures += 1
        if self._failures >= self._max_failures:
            self._open(FIRST_PAUSE_SECONDS)

    def abandoned(self) -> None:
        """Report that the request was cancelled before an answer: that changes nothing."""
        self._probing = False

    def _open(self, pause: float) -> None:
        self._pause = pause
        self._until = self._clock() + pause
