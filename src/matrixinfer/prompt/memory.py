"""Counts the memory that requests take: their bodies, and what is decoded from them."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

_SMALL_BYTES = 1024 * 1024
"""A request that holds no more than this may use the part of the memory that is kept free for small ones."""
_RESERVE = 8
"""One part in this many is kept free for small requests."""


class Memory:
    """Up to `limit` bytes. Thread-safe, because prompts are decoded in threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.refused = 0
        """Requests for which there was no room."""
        self._lock = threading.Lock()

    @property
    def largest(self) -> int:
        """The most that one holder can take."""
        return self.limit - self.limit // _RESERVE

    def hold(self) -> Held:
        """What one holder takes, at first nothing."""
        return Held(self)

    def fits(self, held: int, more: int) -> bool:
        """Whether one that holds `held` bytes may take `more`."""
        limit = self.limit if held + more <= _SMALL_BYTES else self.largest
        return self.used + more <= limit

    def take(self, held: int, more: int) -> bool:
        """Take `more` bytes for one that holds `held`, if there is room."""
        with self._lock:
            if not self.fits(held, more):
                return False
            self.used += more
            return True

    def give(self, count: int) -> None:
        """Give bytes back."""
        with self._lock:
            self.used -= count


class Held:
    """Bytes that one holder has taken. They are given back at the end of its context, or with the object."""

    __slots__ = ("_memory", "bytes")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.bytes = 0

    def fits(self, more: int) -> bool:
        """Whether there is room for `more` bytes now."""
        return self._memory.fits(self.bytes, more)

    def take(self, more: int) -> bool:
        """Take `more` bytes. Returns False, and takes nothing, if there is no room."""
        taken = self._memory.take(self.bytes, more)
        if taken:
            self.bytes += more
        return taken

    def release(self) -> None:
        """Give everything back."""
        taken, self.bytes = self.bytes, 0
        if taken:
            self._memory.give(taken)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()
