"""Lets each kind of message through once per interval."""

from __future__ import annotations

from collections.abc import Callable

_MAX_KINDS = 256


class Intervals:
    """`seconds` is the interval. `clock` gives seconds and never goes back."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._next: dict[str, float] = {}

    def __call__(self, kind: str) -> bool:
        """Whether a message of this kind may be written now. Kinds beyond the most that are kept share one interval."""
        now = self._clock()
        if kind not in self._next and len(self._next) >= _MAX_KINDS:
            kind = ""
        if now < self._next.get(kind, now):
            return False
        self._next[kind] = now + self._seconds
        return True
