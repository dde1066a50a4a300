"""What other gateways have probably sent to each endpoint, though this one has not heard of it yet. Pure.

Several gateways that know the same choose the same: where one pod is the least loaded, each of them sends its next request
there before it hears of the others. So the free pods are dealt out, and those of others cost what these are expected to send
there. No pod is forbidden: a prefix that is cached there, or a queue at the own ones, weighs more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

from matrixinfer.routing.observed import Observed
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads

_PER_PEER = 4.0
"""Requests that a peer is expected to send while nobody hears of them, for each own one that another one precedes: those
before and after it, twice over, because equal prices on both sides would not keep gateways apart."""
_LEAST_TOKENS = 1.0


class Unseen:
    """Expects of other gateways what this one does itself (`LoadLedger.arrivals`)."""

    def __init__(self, load: LoadLedger, peers: PeerLoads, observed: Observed) -> None:
        self._load = load
        self._peers = peers
        self._observed = observed
        self._lots: dict[str, float] = {}

    def expected(self, names: Sequence[str], now: float) -> Mapping[str, float]:
        """Tokens that each of these endpoints must probably compute for requests not heard of; absent where none."""
        number, count = self._peers.place(now)
        if count > 1:
            return self._of_peers(names, number, count)
        return self._of_strangers(names, self._observed.others_share) if self._observed.has_others else {}

    def forget(self, name: str) -> None:
        """An endpoint has gone."""
        self._lots.pop(name, None)

    def _of_peers(self, names: Sequence[str], number: int, count: int) -> Mapping[str, float]:
        """Deal the endpoints out to the gateways by the load that all of them know, the least loaded first.

        Each gateway takes its own in this order. How many it takes before the others hear of it is taken to be
        geometrically distributed.
        """
        arrivals = self._load.arrivals
        mean = _PER_PEER * arrivals.together
        if mean * arrivals.work < _LEAST_TOKENS:
            return {}
        published, work, reached = self._peers.published, arrivals.work, mean / (1.0 + mean)
        order = sorted((published(name), name) for name in names)
        return {
            name: work * reached ** (place // count + 1)
            for place, (_, name) in enumerate(order)
            if place % count != number
        }

    def _of_strangers(self, names: Sequence[str], share: float) -> Mapping[str, float]:
        """Gateways that cannot hear each other each prefer other endpoints, by lot."""
        arrivals = self._load.arrivals
        most = 2.0 * share * arrivals.lately * arrivals.work / max(1, len(names))
        if most < _LEAST_TOKENS:
            return {}
        return {name: most * self._lot(name) for name in names}

    def _lot(self, name: str) -> float:
        """From 0 to 1: always the same for this gateway and this endpoint."""
        lot = self._lots.get(name)
        if lot is None:
            digest = sha256(f"{self._peers.gateway}\0{name}".encode()).digest()
            lot = self._lots[name] = int.from_bytes(digest[:4], "big") / 0xFFFFFFFF
        return lot
