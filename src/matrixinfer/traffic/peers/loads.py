"""The load of other gateways, as they last reported it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from matrixinfer.traffic.peers.message import Load
from matrixinfer.traffic.pod_load import READING_SECONDS, Counts

NO_LOAD = Load(0, 0)
SILENT_SECONDS = 3.0
"""A gateway that has not published for this long is considered gone."""
MAX_PEERS = 64
LATE_SECONDS = 0.5
"""A report may be so old when it comes."""
_MAX_ENDPOINTS = 10_000


class PeerLoads:
    """The load of each peer, and the total per endpoint. Every `now` is in seconds and must not decrease."""

    def __init__(self, gateway: str = "") -> None:
        self.gateway = gateway
        """The id of this gateway, unlike any other's."""
        self._own: Mapping[str, Load] = {}
        self._peers: dict[
            str, tuple[float, Mapping[str, Load]]
        ] = {}  # peer -> time of its last report, and the report; oldest first
        self._totals: dict[str, Load] = {}
        self._counts: dict[str, Counts] = {}  # requests in flight over time

    def update(self, peer: str, load: Mapping[str, Load], now: float) -> bool:
        """Replace the load of a peer. Returns False, and ignores the peer, if there are `MAX_PEERS` others."""
        self._forget_silent(now)
        before = self._peers.pop(peer, None)
        if before is None and len(self._peers) >= MAX_PEERS:
            return False
        if before is not None:
            self._add(before[1], -1)
        self._add(load, 1)
        self._peers[peer] = now, load
        self._note(load if before is None else {**before[1], **load}, now)
        return True

    def totals(self, now: float) -> Mapping[str, Load]:
        """The total load of all peers at each endpoint; endpoints without load are absent."""
        self._forget_silent(now)
        return self._totals

    def publishes(self, load: Mapping[str, Load]) -> None:
        """This gateway has published its load."""
        self._own = load

    def published(self, name: str) -> tuple[int, int]:
        """The load of an endpoint as all gateways know it, this one's included: queued tokens, and requests in flight."""
        others, own = self._totals.get(name, NO_LOAD), self._own.get(name, NO_LOAD)
        return others.queued_tokens + own.queued_tokens, others.in_flight + own.in_flight

    def place(self, now: float) -> tuple[int, int]:
        """This gateway's number among all that are heard, in an order that all know, and how many there are."""
        self._forget_silent(now)
        return sum(peer < self.gateway for peer in self._peers), len(self._peers) + 1

    def most_in_flight(self, name: str, at: float) -> int:
        """The most requests that peers are known to have had in flight at an endpoint around a time."""
        counts = self._counts.get(name)
        return 0 if counts is None else counts.most(at - READING_SECONDS, at + LATE_SECONDS)

    def count(self, now: float) -> int:
        """How many peers have published lately."""
        self._forget_silent(now)
        return len(self._peers)

    def _forget_silent(self, now: float) -> None:
        while self._peers:
            peer, (reported_at, load) = next(iter(self._peers.items()))
            if now < reported_at + SILENT_SECONDS:
                return
            del self._peers[peer]
            self._add(load, -1)
            self._note(load, now)

    def _note(self, names: Iterable[str], now: float) -> None:
        if len(self._counts) > _MAX_ENDPOINTS:
            self._counts = {name: each for name, each in self._counts.items() if name in self._totals}
        for name in names:
            self._counts.setdefault(name, Counts()).changed(now, self._totals.get(name, NO_LOAD).in_flight)

    def _add(self, load: Mapping[str, Load], sign: int) -> None:
        totals = self._totals
        for name, each in load.items():
            before = totals.pop(name, NO_LOAD)
            total = Load(before.in_flight + sign * each.in_flight, before.queued_tokens + sign * each.queued_tokens)
            if total.in_flight or total.queued_tokens:
                totals[name] = total
