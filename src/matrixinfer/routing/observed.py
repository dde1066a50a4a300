"""What follows from two looks at an endpoint: the requests that others send there, its speed, and how its cache turns over.

An engine's gauges count every request, but they are from the past. What the gateways had in flight around that time is
known, so the rest is of others. Pure.
"""

from __future__ import annotations

from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.scheduler.framework import UNKNOWN, Condition
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import LATE_SECONDS, PeerLoads

REFRESH_SECONDS = 0.1
"""A condition is made so often at most, as every decision needs those of all endpoints."""
SAMPLE_SECONDS = 1.0
HALF_LIFE_SECONDS = 30.0
"""A turnover counts for half of it after this time."""
_NEVER = float("-inf")
_READING_SHARE = 0.02
"""What one reading of an endpoint's gauges counts for in the share of others."""
_LEAST_OWN, _MOST_SHARE = 0.01, 64.0
_LEAST_OTHERS = 0.05
_LEAST_WORK = 64.0
"""Requests that compute fewer tokens cannot be told from what decoding stores."""


class Seen:
    """What one endpoint has shown. Plain attributes, because every decision reads them of every endpoint."""

    __slots__ = ("again_at", "base", "condition", "due", "evicted", "foreign", "read_at", "sampled_at", "turnover")

    def __init__(self) -> None:
        self.read_at = _NEVER
        """When the engine's gauges were read that `foreign` rests on."""
        self.foreign = 0
        """Requests that no gateway sent."""
        self.again_at = 0.0
        """When the reports of peers about the time of the reading have come."""
        self.base: int | None = None
        """Tokens that its cache had stored for others when the gauges were read; None until that is known."""
        self.condition = UNKNOWN
        self.due = _NEVER
        """When `condition` must be made again."""
        self.sampled_at = 0.0
        self.evicted: int | None = None
        self.turnover = 0.0


class Observed:
    """Remembers what each endpoint has shown. Every `now` is in seconds and must not decrease."""

    def __init__(self, load: LoadLedger, peers: PeerLoads) -> None:
        self._load = load
        self._peers = peers
        self._seen: dict[str, Seen] = {}
        self._own = 0.0
        """Requests of the gateways that are heard, and of others, that the gauges of an endpoint show: averages."""
        self._others = 0.0

    @property
    def others_share(self) -> float:
        """Requests of others for each one of the gateways that are heard."""
        return min(_MOST_SHARE, self._others / self._own) if self._own > _LEAST_OWN else 0.0

    @property
    def has_others(self) -> bool:
        """Whether somebody who is not heard sends requests, too. Gauges and counts never agree exactly."""
        return self.others_share >= _LEAST_OTHERS

    def of(self, name: str) -> Seen:
        """What an endpoint has shown so far."""
        seen = self._seen.get(name)
        if seen is None:
            seen = self._seen[name] = Seen()
        return seen

    def foreign(self, name: str, counted: int, read_at: float, now: float) -> int:
        """Requests at an endpoint that no gateway sent, where its engine counted `counted` when it was read."""
        seen = self.of(name)
        if seen.read_at != read_at or now >= seen.again_at:
            own = self._load.most_in_flight(name, read_at) + self._peers.most_in_flight(name, read_at)
            count = counted - own
            if seen.read_at != read_at:
                seen.base = None
                self._own += (own - self._own) * _READING_SHARE
                self._others += (max(0, count) - self._others) * _READING_SHARE
            due = read_at + LATE_SECONDS
            seen.read_at, seen.foreign, seen.again_at = read_at, max(0, count), due if now < due else float("inf")
        return seen.foreign

    def came(self, name: str, footprint: Footprint | None) -> int:
        """Requests of others that have come since the gauges were read, as far as what the engine has stored shows.

        Events come at once, where gauges are read each second: until then several gateways would send to the pod that
        was idle. What own requests store, and prompts of the usual size, are known; the rest is of others.
        """
        work = self._load.arrivals.work
        if footprint is None or work < _LEAST_WORK or not self.has_others:
            return 0
        seen = self.of(name)
        stored = footprint.held_tokens + footprint.evicted_tokens - self._load.computed_tokens(name)
        if seen.base is None:
            seen.base = stored
        return max(0, round((stored - seen.base - self._load.queued_tokens(name)) / work))

    def condition(
        self, name: str, now: float, *, rate: float, footprint: Footprint | None, reported: int | None
    ) -> Condition:
        """How an endpoint is. `rate` is its speed in tokens per second, `reported` the size of its cache as it says."""
        seen = self.of(name)
        if now >= seen.due:
            seen.due = now + REFRESH_SECONDS
            if footprint is None:
                seen.condition = Condition(prefill_rate=rate)
            else:
                _sample(seen, footprint.evicted_tokens, now)
                seen.condition = Condition(
                    prefill_rate=rate,
                    held_tokens=footprint.held_tokens,
                    cache_tokens=footprint.capacity(reported),
                    evicted_per_second=seen.turnover,
                )
        return seen.condition

    def forget(self, name: str) -> None:
        """An endpoint has gone."""
        self._seen.pop(name, None)


def _sample(seen: Seen, evicted: int, now: float) -> None:
    """Bring the tokens that a cache evicts per second up to date."""
    if seen.evicted is None:
        seen.sampled_at, seen.evicted = now, evicted
        return
    passed = now - seen.sampled_at
    if passed >= SAMPLE_SECONDS:
        kept = 0.5 ** (passed / HALF_LIFE_SECONDS)
        seen.turnover = seen.turnover * kept + max(0, evicted - seen.evicted) / passed * (1.0 - kept)
        seen.sampled_at, seen.evicted = now, evicted
