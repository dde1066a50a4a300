"""Lets long work in a thread end when nobody waits for it any more.

Python cannot stop a thread, and a process that could be killed would need a second copy of every tokenizer and of what it
remembers. So the work is done in pieces, and asks between them whether it is still wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar, Token

from matrixinfer.errors import TokenizeError

_current: ContextVar[Effort | None] = ContextVar("effort", default=None)


class Abandoned(TokenizeError):
    """The work took too long, or nobody waits for it any more."""


class Effort:
    """One piece of work, which ends `seconds` after it begins or when `stop` is called. Runs in one thread at a time."""

    __slots__ = ("_clock", "_deadline", "_outer", "_seconds", "_stopped", "spent")

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._deadline = 0.0
        self._stopped = False
        self.spent = 0
        """What it has used of anything that is counted."""
        self._outer: Token[Effort | None] | None = None

    def stop(self) -> None:
        """Nobody waits for it any more. May be called in any thread."""
        self._stopped = True

    def check(self) -> None:
        """Raise `Abandoned` if it must end."""
        if self._stopped:
            raise Abandoned("nobody waits for the token ids any more")
        if self._clock() > self._deadline:
            raise Abandoned(f"the work took longer than {self._seconds:g} s")

    def __enter__(self) -> Effort:
        self._deadline = self._clock() + self._seconds
        self._outer = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._outer is not None:
            _current.reset(self._outer)


def check() -> None:
    """Raise `Abandoned` if the work of this thread must end."""
    effort = _current.get()
    if effort is not None:
        effort.check()


def spend(count: int) -> int:
    """Count something that the work of this thread uses. Returns how much that was until now."""
    effort = _current.get()
    if effort is None:
        return count
    effort.spent += count
    return effort.spent


def is_under_way() -> bool:
    """Whether the work of this thread has a limit."""
    return _current.get() is not None
