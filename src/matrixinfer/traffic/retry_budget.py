"""How many requests may be sent again: a share of all requests, so that retries never multiply an overload. Pure."""

from __future__ import annotations

from collections.abc import Callable

_SECONDS = 10.0
"""Unused permissions are kept for this long."""


class RetryBudget:
    """Gives `share` permissions per request, and `per_second` in any case, as Finagle's retry budget does."""

    def __init__(self, share: float, per_second: float, clock: Callable[[], float]) -> None:
        self._share = share
        self._per_second = per_second
        self._clock = clock
        self._balance = per_second * _SECONDS
        self._at = clock()
        self._requests = 0.0
        """Requests lately, which decay: the most that can be saved is their share."""

    def reconfigure(self, share: float, per_second: float) -> None:
        """Give so many permissions from now on."""
        self._age()
        self._share, self._per_second = share, per_second

    def requested(self) -> None:
        """A client's request came."""
        self._age()
        self._requests += 1
        self._balance += self._share

    def take(self) -> bool:
        """Whether one more request may be sent again; if so, it is counted."""
        self._age()
        if self._balance < 1:
            return False
        self._balance -= 1
        return True

    def _age(self) -> None:
        now = self._clock()
        passed, self._at = now - self._at, now
        self._requests *= max(0.0, 1 - passed / _SECONDS)
        most = (self._requests + 1) * self._share + self._per_second * _SECONDS
        self._balance = min(self._balance + self._per_second * passed, most)
