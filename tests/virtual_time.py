"""An event loop whose clock jumps to the next timer when there is nothing to do, so that waiting takes no time.

Sockets are real. Some of their traffic passes through threads that the loop knows nothing about, as ZMQ's does: what is on
its way must not be overtaken by the clock, so a test says when it has arrived (`hold_while`).
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple, Unpack

import pytest

_LOOK_SECONDS = 0.001
_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its time, and `time.monotonic` where `monotonic_of` patches it, has nothing to do with the clock on the wall."""

    def __init__(self) -> None:
        self._now = 0.0
        self._working = 0
        self._held: list[Callable[[], bool]] = []
        super().__init__(_Selector(self._advance))

    def time(self) -> float:
        return self._now

    @contextmanager
    def hold_while(self, busy: Callable[[], bool]) -> Iterator[None]:
        """Within the context the clock stands still while `busy()`, though no task can go on."""
        self._held.append(busy)
        try:
            yield
        finally:
            self._held.remove(busy)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[_Args]], _Result], *args: *_Args
    ) -> asyncio.Future[_Result]:
        """The clock stands still while a thread works."""
        future = super().run_in_executor(executor, func, *args)
        self._working += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _: asyncio.Future[Any]) -> None:
        self._working -= 1

    def _advance(self, seconds: float) -> bool:
        """Let `seconds` pass, unless something is under way."""
        if self._working or any(busy() for busy in self._held):
            return False
        self._now += seconds
        return True


class _Selector(selectors.DefaultSelector):
    def __init__(self, advance: Callable[[float], bool]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        while True:
            ready = super().select(0)
            if ready or timeout == 0:
                return ready
            if timeout is None:
                return super().select(None)
            if self._advance(timeout):
                return []
            if ready := super().select(_LOOK_SECONDS):
                return ready


def monotonic_of(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `time.monotonic` show the loop's time."""
    monkeypatch.setattr(time, "monotonic", loop.time)
