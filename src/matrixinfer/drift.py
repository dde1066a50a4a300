"""Whether engines find in their caches what the index says that they hold.

Where an answer tells how many prompt tokens the engine found in its cache, that is held against what the index said of the
pod when it was chosen. Fewer means that the index claims blocks that are not there: an engine that lost them and did not say
so, or events that went missing unnoticed. A block that was evicted while the request waited is no fault: the events told of
it. After a run of such answers what is indexed of the pod is cleared and its history fetched anew; if that does not help, it
is cleared and built up from what comes; each time again only after a pause twice as long.

More than was predicted is no fault either: another gateway's requests, and blocks whose events are on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import structlog

from matrixinfer.kvevents.supports import Supports, Watch
from matrixinfer.telemetry.metrics import Metrics

Outcome: TypeAlias = Literal["exact", "more", "fewer", "evicted"]

RUN = 3
"""Answers in a row with fewer cached tokens than predicted after which a pod is looked at anew."""
_FIRST_PAUSE_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 600.0


class Resync(Protocol):
    """Clears what is indexed of an endpoint, and has its history fetched anew (`replay`) or not."""

    def __call__(self, name: str, *, replay: bool) -> None:
        """Returns at once."""
        ...


@dataclass(slots=True)
class _Endpoint:
    tells: bool = False
    """It has told of cached tokens, so that silence means none."""
    streak: int = 0
    not_before: float = float("-inf")
    pause: float = _FIRST_PAUSE_SECONDS
    replays: bool = True
    """The next time its history is fetched anew; after that it is not."""


class Drift:
    """Keeps account of every endpoint. `clock` gives seconds and never goes back."""

    def __init__(self, metrics: Metrics, resync: Resync, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._resync = resync
        self._clock = clock
        self._endpoints: dict[str, _Endpoint] = {}

    def reported(self, name: str, *, predicted: int, cached: int | None, evicted: bool) -> None:
        """An answer of the endpoint tells that it found `cached` tokens in its cache; None says nothing, or none."""
        endpoint = self._endpoints.setdefault(name, _Endpoint())
        if cached is None and not endpoint.tells:
            return
        endpoint.tells = True
        outcome = _outcome(predicted, cached or 0, evicted=evicted)
        self._metrics.drift(name, outcome, predicted, cached or 0)
        if outcome == "evicted":
            return
        if outcome != "fewer":
            endpoint.streak = 0
            return
        endpoint.streak += 1
        if endpoint.streak >= RUN and self._clock() >= endpoint.not_before:
            self._heal(name, endpoint)

    def forget(self, name: str) -> None:
        """The endpoint is gone."""
        self._endpoints.pop(name, None)

    def _heal(self, name: str, endpoint: _Endpoint) -> None:
        structlog.get_logger(__name__).warning("kv_events_drift", pod=name, replay=endpoint.replays)
        self._metrics.resynced(name)
        now = self._clock()
        if now > endpoint.not_before + 10 * endpoint.pause:  # it has been good for long
            endpoint.pause, endpoint.replays = _FIRST_PAUSE_SECONDS, True
        self._resync(name, replay=endpoint.replays)
        endpoint.replays = not endpoint.replays
        endpoint.not_before = now + endpoint.pause
        endpoint.pause = min(2 * endpoint.pause, _LONGEST_PAUSE_SECONDS)
        endpoint.streak = 0


class Prediction:
    """What the index says that an endpoint will find of one prompt, in whole engine blocks."""

    __slots__ = ("_drift", "_name", "_supports", "_watch", "tokens")

    def __init__(self, drift: Drift, name: str, tokens: int, supports: Supports, last: int | None) -> None:
        """`last` is the last token block predicted, which is gone as soon as any before it is."""
        self.tokens = tokens
        self._drift = drift
        self._name = name
        self._supports = supports
        self._watch: Watch | None = None if last is None else supports.watch(last)

    def reported(self, cached: int | None) -> None:
        """The answer tells of `cached` tokens."""
        evicted = self._watch is not None and self._watch.gone
        self._drift.reported(self._name, predicted=self.tokens, cached=cached, evicted=evicted)

    def end(self) -> None:
        """The request is over, or tried elsewhere."""
        if self._watch is not None:
            self._supports.unwatch(self._watch)
            self._watch = None


def _outcome(predicted: int, cached: int, *, evicted: bool) -> Outcome:
    if cached == predicted:
        return "exact"
    if cached > predicted:
        return "more"
    return "evicted" if evicted else "fewer"
