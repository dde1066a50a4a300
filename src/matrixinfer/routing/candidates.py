"""The snapshot that a decision is made on: every endpoint of a model, what it holds of the prompt, and how loaded it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from matrixinfer.config import WeightsConfig
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import Endpoint, PodRegistry
from matrixinfer.pods.slow_start import held_back
from matrixinfer.routing.holdings import Match, holdings, match_at
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.observed import Observed
from matrixinfer.routing.prepared import Prepared
from matrixinfer.routing.standings import Standings
from matrixinfer.routing.unseen import Unseen
from matrixinfer.scheduler.framework import Adapters, Candidate, SchedulingRequest
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import NO_LOAD, PeerLoads
from matrixinfer.traffic.peers.message import Load

NOTHING: Mapping[str, int] = MappingProxyType({})


class Candidates:
    """Puts candidates together from what each part knows about them. `reuse` gives `Candidate.reuse` of an endpoint.

    Pods that have come up within `slow_start_seconds` get no more than a share.
    """

    def __init__(
        self,
        registry: PodRegistry,
        lookup: Lookup,
        load: LoadLedger,
        history: RoutingHistory,
        weights: WeightsConfig,
        outliers: Outliers,
        peers: PeerLoads | None = None,
        reuse: Callable[[str], float] = lambda _: 1.0,
        slow_start_seconds: float = 0.0,
    ) -> None:
        self.slow_start_seconds = slow_start_seconds
        self._registry = registry
        self._caches = lookup.caches
        self._load = load
        self._history = history
        self._weights = weights
        self._outliers = outliers
        self._peers = PeerLoads() if peers is None else peers
        self._observed = Observed(load, self._peers)
        self._unseen = Unseen(load, self._peers, self._observed)
        self._standings = Standings(registry, self._caches, load, self._observed, reuse)

    def reconfigure(self, weights: WeightsConfig, slow_start_seconds: float) -> None:
        """Count so from the next decision on."""
        self._weights = weights
        self.slow_start_seconds = slow_start_seconds

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone."""
        self._standings.forget(endpoint)
        self._observed.forget(endpoint)
        self._unseen.forget(endpoint)

    def snapshot(self, prepared: Prepared) -> list[Candidate]:
        """The endpoints of the request's pods now, without pods that have left meanwhile. Changes nothing."""
        now = prepared.request.now
        others = self._peers.totals(now)
        endpoints = [
            endpoint for pod in prepared.pods if not pod.gone and pod.drain is None for endpoint in pod.endpoints
        ]
        names = [endpoint.name for endpoint in endpoints]
        found = self._holding(prepared, endpoints, others)
        unseen = self._unseen.expected(names, now)
        reads_events = self._observed.has_others and not self._peers.count(now)
        if unseen or reads_events:
            found = [self._besides(each, unseen.get(each.name, 0.0), reads_events) for each in found]
        withheld = self._outliers.withheld(names)
        if now - self._registry.newest_up < self.slow_start_seconds:
            withheld = {**self._held_back(endpoints, withheld, others, now), **withheld}
        if withheld:
            found = [replace(each, withheld=withheld.get(each.name)) for each in found]
        if prepared.request.adapter is not None:
            found = [
                replace(each, adapters=self._adapters(endpoint, now))
                for each, endpoint in zip(found, endpoints, strict=True)
            ]
        return found

    def _held_back(
        self, endpoints: Sequence[Endpoint], withheld: Mapping[str, str], others: Mapping[str, Load], now: float
    ) -> Mapping[str, str]:
        """Why pods that came up lately get no request, by endpoint."""

        def in_flight(name: str) -> int:
            return self._load.in_flight(name) + others.get(name, NO_LOAD).in_flight

        return held_back(endpoints, in_flight, now=now, seconds=self.slow_start_seconds, withheld=withheld)

    def limits_of(self, endpoint: str) -> Sequence[str]:
        """Why the cache of an endpoint is not known exactly, in words."""
        return self._caches.limits_of(endpoint)

    def _holding(
        self, prepared: Prepared, endpoints: Sequence[Endpoint], others: Mapping[str, Load]
    ) -> list[Candidate]:
        """The endpoints with what they hold of the prompt."""
        request, matches, reads_cache = prepared.request, prepared.matches, prepared.prompt.reads_cache
        now, approximate, standing_of = request.now, prepared.is_approximate, self._standings.of
        if approximate:
            matches = None
        # Where blocks are all that there is to know, this says what `holdings` says.
        is_plain = matches is not None and reads_cache and not request.chunks
        blocks, tails = (NOTHING, NOTHING) if matches is None else (matches.blocks, matches.tails)
        pending, until = self._load.pending_at(request.model), self._load.now()
        found = list[Candidate]()
        for endpoint in endpoints:
            name = endpoint.name
            standing = standing_of(endpoint, others.get(name, NO_LOAD) if others else NO_LOAD, now)
            cache, candidate = standing.cache, standing.candidate
            if standing.waits:
                unseen = standing.waits * self._load.arrivals.work
                candidate = replace(candidate, unseen_tokens=unseen)
            if not is_plain or cache is None or not cache.is_plain:
                match = match_at(name, cache, matches)
                candidate = self._with(candidate, request, match, reads_cache, approximate)
            else:
                held = blocks.get(name, 0)
                ahead = pending[name].count(request.chain, held, until) if name in pending else 0
                if held or ahead:
                    tail = tails.get(name, 0) if tails else 0
                    candidate = replace(candidate, matched_blocks=held, matched_tail=tail, pending_blocks=ahead)
            found.append(candidate)
        return found

    def _with(
        self, candidate: Candidate, request: SchedulingRequest, match: Match, reads_cache: bool, approximate: bool
    ) -> Candidate:
        """The candidate with what it holds of the prompt, whatever its cache is like."""
        trust, pending, recent, credit, chunks, guessed = holdings(
            candidate.name, request, match, self._load, self._history, self._weights, reads_cache, approximate
        )
        return replace(
            candidate,
            trust=trust,
            matched_blocks=match.blocks,
            matched_tail=match.tail,
            tiers=match.tiers,
            pending_blocks=pending,
            recent_blocks=recent,
            cached_credit=credit,
            recent_chunks=chunks,
            guessed_tokens=guessed,
        )

    def _besides(self, candidate: Candidate, unseen: float, reads_events: bool) -> Candidate:
        """The candidate with what other gateways have probably sent there unheard."""
        foreign = candidate.foreign
        if foreign is not None and reads_events:
            cache = self._caches.of(candidate.name)
            if cache is not None:
                foreign += self._observed.came(candidate.name, cache.footprint)
        return replace(candidate, foreign=foreign, unseen_tokens=candidate.unseen_tokens + unseen)

    def _adapters(self, endpoint: Endpoint, now: float) -> Adapters | None:
        """What an engine says about its adapters."""
        metrics = self._registry.metrics_of(endpoint.pod, now)
        if metrics is None or metrics.adapters is None:
            return None
        return Adapters(names=frozenset(metrics.adapters), most=metrics.most_adapters)
