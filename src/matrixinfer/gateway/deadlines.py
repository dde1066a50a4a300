"""One timer for the deadlines of all requests. All last equally long, so the first to begin is the first to pass."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deadlines:
    """Limits contexts to `seconds` each."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._open: dict[Deadline, None] = {}
        """In the order in which they began."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Deadline:
        """A deadline for a context, which it begins with."""
        return Deadline(self)

    def add(self, deadline: Deadline) -> float:
        """Watch a deadline that begins now. Returns when it passes."""
        loop = asyncio.get_running_loop()
        when = loop.time() + self.seconds
        self._open[deadline] = None
        if self._timer is None:
            self._timer = loop.call_at(when, self._check)
        return when

    def discard(self, deadline: Deadline) -> None:
        """Stop watching a deadline."""
        self._open.pop(deadline, None)

    def _check(self) -> None:
        """Let the deadlines pass that are due. The timer may be early: it is not set again when its deadline ends."""
        loop = asyncio.get_running_loop()
        now, self._timer = loop.time(), None
        for deadline in tuple(self._open):
            if deadline.when > now:
                self._timer = loop.call_at(deadline.when, self._check)
                return
            del self._open[deadline]
            deadline.pass_now()


class Deadline:
    """Raises `TimeoutError` if its context takes too long, as `asyncio.timeout` does."""

    __slots__ = ("_cancelling", "_deadlines", "_task", "has_passed", "when")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self.has_passed = False
        self.when = 0.0

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        if self._task is None:
            raise RuntimeError("a deadline needs a task")
        self._cancelling = self._task.cancelling()
        self.when = self._deadlines.add(self)

    def pass_now(self) -> None:
        """Cancel the task in the context."""
        if self._task is not None:
            self.has_passed = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._deadlines.discard(self)
        task, self._task = self._task, None
        # Whoever else cancels the task at the same time means to end it, and not this context alone.
        if (
            self.has_passed
            and task is not None
            and task.uncancel() <= self._cancelling
            and kind is asyncio.CancelledError
        ):
            raise TimeoutError from error
