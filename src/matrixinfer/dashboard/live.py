"""What a page shows, and what of it has changed since the page last asked.

Nothing runs while no page is open: who asks brings what is older than a moment up to date, for all who ask. Every part
has the version in which it last changed, so that pages need no memory here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import TypeVar

import msgspec

from matrixinfer.dashboard.decisions import DecisionRow, row
from matrixinfer.dashboard.fleet import EndpointRow, Fleet
from matrixinfer.dashboard.history import BUCKET_SECONDS, BUCKETS, History, Point
from matrixinfer.routing.decision_log import DecisionLog

T = TypeVar("T")

DECISIONS = 40
"""How many of the last decisions are shown."""
_FRESH_SECONDS = 0.5


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while the gateway runs."""

    version: str
    api: str
    """Base URL of the API."""
    decisions_kept: int
    bucket_seconds: int = BUCKET_SECONDS
    buckets: int = BUCKETS


class View(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything at first, later what has changed; what is absent has not."""

    version: int
    at: float
    """Unix time in seconds."""
    up_s: float
    """Seconds since the gateway began to count."""
    hour: Point
    points: list[Point]
    """The buckets that may have changed; by their numbers they replace those that the page has."""
    about: About | None = None
    names: list[str] | None = None
    """All endpoints, in the order of the pods, if one has come or gone."""
    endpoints: list[EndpointRow] | None = None
    """Those that have changed."""
    models: Mapping[str, int] | None = None
    """Requests in the hour."""
    decisions: list[DecisionRow] | None = None
    """The last ones, newest first."""


class Live:
    """Views of the gateway. `clock` is monotonic, `wall` gives Unix time; both in seconds."""

    def __init__(
        self,
        fleet: Fleet,
        history: History,
        log: DecisionLog,
        about: Callable[[], About],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._history = history
        self._log = log
        self._about = about
        self._clock = clock
        self._wall = wall
        self._read_at = float("-inf")
        self._version = 0
        self._rows: dict[str, tuple[int, EndpointRow]] = {}
        """By name: the version in which the row last changed, and the row."""
        self._names: tuple[int, list[str]] = (0, [])
        self._decisions: tuple[int, list[DecisionRow]] = (0, [])
        self._models: tuple[int, dict[str, int]] = (0, {})
        self.numbers: dict[int, int] = {}
        """The bucket that was the current one at each of the last versions."""

    def view(self, since: int = 0) -> View:
        """What has changed after version `since`; everything for 0, and for a version that is not known any more."""
        self._refresh()
        known_bucket = self.numbers.get(since)
        if known_bucket is None:
            since = 0
        names = self._names[1] if self._names[0] > since or not since else None
        changed = [each for version, each in self._rows.values() if version > since]
        return View(
            version=self._version,
            at=round(self._wall(), 3),
            up_s=round(self._clock() - self._history.began, 1),
            hour=self._history.total(),
            points=self._history.points(known_bucket or 0),
            about=None if since else self._about(),
            names=names,
            endpoints=changed or (None if since else []),
            models=self._models[1] if self._models[0] > since or not since else None,
            decisions=self._decisions[1] if self._decisions[0] > since or not since else None,
        )

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._read_at < _FRESH_SECONDS:
            return
        self._read_at = now
        self._version += 1
        version, rows = self._version, self._rows
        fresh: dict[str, tuple[int, EndpointRow]] = {}
        for each in self._fleet.rows():
            before = rows.get(each.name)
            fresh[each.name] = before if before is not None and before[1] == each else (version, each)
        self._rows = fresh
        self._names = _changed(self._names, list(fresh), version)
        self._decisions = _changed(
            self._decisions, [row(each) for each in islice(self._log.newest(), DECISIONS)], version
        )
        self._models = _changed(self._models, dict(self._history.hour.models), version)
        self.numbers[version] = self._history.number
        if len(self.numbers) > BUCKETS:
            del self.numbers[next(iter(self.numbers))]


def _changed(before: tuple[int, T], now: T, version: int) -> tuple[int, T]:
    return before if before[1] == now else (version, now)
