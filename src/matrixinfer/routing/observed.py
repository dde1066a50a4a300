"""What follows from two looks at an endpoint: the requests that others send there, and how fast its cache turns over. Pure.

An engine's gauges count every request, but they are from the past. What the gateways had in flight around that time is
known, so the rest is of others.
"""

from __future__ import annotations

from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import LATE_SECONDS, PeerLoads

SAMPLE_SECONDS = 1.0
HALF_LIFE_SECONDS = 30.0
"""A turnover counts for half of it after this time."""


class _Foreign:
    """The requests of others at one reading of an engine's gauges."""

    __slots__ = ("again_at", "count", "read_at")

    def __init__(self, read_at: float, count: int, again_at: float) -> None:
        self.read_at = read_at
        self.count = count
        self.again_at = again_at
        """When the reports of peers about that time have come."""


class _Turnover:
    """Tokens that one cache evicts per second."""

    __slots__ = ("at", "evicted", "rate")

    def __init__(self, at: float, evicted: int) -> None:
        self.at = at
        self.evicted = evicted
        self.rate = 0.0


class Observed:
    """Remembers what each endpoint has shown. Every `now` is in seconds and must not decrease."""

    def __init__(self, load: LoadLedger, peers: PeerLoads) -> None:
        self._load = load
        self._peers = peers
        self._foreign: dict[str, _Foreign] = {}
        self._turnover: dict[str, _Turnover] = {}

    def foreign(self, name: str, counted: int, read_at: float, now: float) -> int:
        """Requests at an endpoint that no gateway sent, where its engine counted `counted` when it was read."""
        known = self._foreign.get(name)
        if known is None or known.read_at != read_at or now >= known.again_at:
            count = counted - self._load.most_in_flight(name, read_at) - self._peers.most_in_flight(name, read_at)
            due = read_at + LATE_SECONDS
            known = self._foreign[name] = _Foreign(read_at, max(0, count), due if now < due else float("inf"))
        return known.count

    def turnover(self, name: str, footprint: Footprint, now: float) -> float:
        """Tokens that an endpoint's cache has evicted per second lately."""
        seen = self._turnover.get(name)
        if seen is None:
            seen = self._turnover[name] = _Turnover(now, footprint.evicted_tokens)
        elif now >= seen.at + SAMPLE_SECONDS:
            passed, evicted = now - seen.at, footprint.evicted_tokens
            kept = 0.5 ** (passed / HALF_LIFE_SECONDS)
            seen.rate = seen.rate * kept + max(0, evicted - seen.evicted) / passed * (1.0 - kept)
            seen.at, seen.evicted = now, evicted
        return seen.rate

    def forget(self, name: str) -> None:
        """An endpoint has gone."""
        self._foreign.pop(name, None)
        self._turnover.pop(name, None)
