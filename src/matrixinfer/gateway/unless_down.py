"""Gives up an attempt at a pod that goes down meanwhile."""

from __future__ import annotations

import asyncio
from types import TracebackType

from matrixinfer.gateway.pod_connection import AttemptFailed
from matrixinfer.routing.in_flight import InFlight


class UnlessDown:
    """Raises `AttemptFailed` if the pod is declared down within its context: it may be frozen, and never answer.

    It does nothing if no other endpoint could get the request.
    """

    __slots__ = ("_in_flight", "_is_down", "_pod", "_task")

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self._pod = in_flight.pod.pod
        self._task = asyncio.current_task()
        self._is_down = False

    def __enter__(self) -> None:
        self._in_flight.watch_down(self._pod, self._down)

    def _down(self) -> None:
        if self._task is not None and not self._is_down and self._in_flight.following() is not None:
            self._is_down = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._in_flight.unwatch_down(self._pod, self._down)
        # Whoever else cancels the task at the same time means to end it, and not this attempt alone.
        if self._is_down and self._task is not None and not self._task.uncancel() and kind is asyncio.CancelledError:
            raise AttemptFailed("went_down", was_sent=True) from error
