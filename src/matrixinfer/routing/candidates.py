"""The snapshot that a decision is made on: every endpoint of a model, what it holds of the prompt, and how loaded it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matrixinfer.config import WeightsConfig
from matrixinfer.pods.load_reports import LoadReport
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import Endpoint, EngineMetrics, PodRegistry, RankMetrics
from matrixinfer.pods.slow_start import held_back
from matrixinfer.routing.holdings import Matches, holdings
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.observed import Observed
from matrixinfer.routing.prepare import Prepared
from matrixinfer.routing.unseen import Unseen
from matrixinfer.scheduler.framework import Adapters, Candidate
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import NO_LOAD, PeerLoads
from matrixinfer.traffic.peers.message import Load


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
        self._lookup = lookup
        self._load = load
        self._history = history
        self._weights = weights
        self._outliers = outliers
        self._peers = PeerLoads() if peers is None else peers
        self._reuse = reuse
        self._observed = Observed(load, self._peers)
        self._unseen = Unseen(load, self._peers, self._observed)

    def reconfigure(self, weights: WeightsConfig, slow_start_seconds: float) -> None:
        """Count so from the next decision on."""
        self._weights = weights
        self.slow_start_seconds = slow_start_seconds

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone."""
        self._observed.forget(endpoint)
        self._unseen.forget(endpoint)

    def snapshot(self, prepared: Prepared) -> list[Candidate]:
        """The endpoints of the request's pods now, without pods that have left meanwhile. Changes nothing."""
        approximate = prepared.is_approximate
        matches = None if approximate else prepared.matches
        now = prepared.request.now
        others = self._peers.totals(now)
        endpoints = [
            endpoint for pod in prepared.pods if not pod.gone and pod.drain is None for endpoint in pod.endpoints
        ]
        names = [endpoint.name for endpoint in endpoints]
        unseen = self._unseen.expected(names, now)
        reads_events = self._observed.has_others and not self._peers.count(now)
        withheld = self._outliers.withheld(names)
        if now - self._registry.newest_up < self.slow_start_seconds:
            withheld = {**self._held_back(endpoints, withheld, others, now), **withheld}
        return [
            self._candidate(
                endpoint,
                prepared,
                matches,
                others.get(name, NO_LOAD) if others else NO_LOAD,
                withheld.get(name) if withheld else None,
                approximate,
                unseen.get(name, 0.0) if unseen else 0.0,
                reads_events,
            )
            for endpoint, name in zip(endpoints, names, strict=True)
        ]

    def _held_back(
        self, endpoints: Sequence[Endpoint], withheld: Mapping[str, str], others: Mapping[str, Load], now: float
    ) -> Mapping[str, str]:
        """Why pods that came up lately get no request, by endpoint."""

        def in_flight(name: str) -> int:
            return self._load.in_flight(name) + others.get(name, NO_LOAD).in_flight

        return held_back(endpoints, in_flight, now=now, seconds=self.slow_start_seconds, withheld=withheld)

    def limits_of(self, endpoint: str) -> Sequence[str]:
        """Why the cache of an endpoint is not known exactly, in words."""
        return self._lookup.limits_of(endpoint)

    def _candidate(
        self,
        endpoint: Endpoint,
        prepared: Prepared,
        matches: Matches | None,
        others: Load,
        withheld: str | None,
        approximate: bool,
        unseen: float,
        reads_events: bool,
    ) -> Candidate:
        name, load, request = endpoint.name, self._load, prepared.request
        match = self._lookup.match_at(name, matches)
        cache = match.cache
        trust, pending, recent, credit, chunks, guessed = holdings(
            name, request, match, load, self._history, self._weights, prepared.prompt.reads_cache, approximate
        )
        metrics = self._registry.metrics_of(endpoint.pod, request.now)
        published = self._registry.load_of(endpoint, request.now) if endpoint.pod.loads else None
        engine: EngineMetrics | RankMetrics | LoadReport | None = metrics
        if published is not None:
            engine = published
        elif metrics is not None and endpoint.rank is not None:
            engine = metrics.ranks.get(endpoint.rank)
        engine_block = None if cache is None else cache.engine_block
        if engine_block is None and metrics is not None:
            engine_block = metrics.block_size
        now, read = request.now, published or metrics
        own_in_flight, own_tokens, queue_seconds, rate = load.view(name, now)
        running, waiting = (engine.running, engine.waiting) if engine else (None, None)
        seen = self._observed.of(name)
        foreign = None
        if read is not None and running is not None:
            if seen.read_at == read.read_at and now < seen.again_at:
                foreign = seen.foreign
            else:
                foreign = self._observed.foreign(name, running + (waiting or 0), read.read_at, now)
            if foreign and waiting:
                unseen += min(waiting, foreign) * load.arrivals.work
            if reads_events and cache is not None:
                foreign += self._observed.came(name, cache.footprint)
        if now < seen.due:
            condition = seen.condition
        else:
            condition = self._observed.condition(
                name,
                now,
                rate=rate,
                footprint=None if cache is None else cache.footprint,
                reported=None if metrics is None else metrics.cache_tokens,
            )
        if others.queued_tokens:
            queue_seconds += others.queued_tokens / rate
        return Candidate(
            name=name,
            url=endpoint.pod.url,
            rank=endpoint.rank,
            in_flight=own_in_flight + others.in_flight,
            queued_tokens=own_tokens + others.queued_tokens,
            peers_in_flight=others.in_flight,
            foreign=foreign,
            unseen_tokens=unseen,
            queue_seconds=queue_seconds,
            condition=condition,
            running=running,
            waiting=waiting,
            cache_usage=engine.cache_usage if engine else None,
            metrics_age=None if read is None else now - read.read_at,
            feed=None if cache is None else cache.feed,
            trust=trust,
            engine_block=engine_block,
            matched_blocks=match.blocks,
            matched_tail=match.tail,
            dropped_tokens=0 if match.cache is None else match.cache.drop,
            tiers=match.tiers,
            pending_blocks=pending,
            recent_blocks=recent,
            withheld=withheld,
            cached_credit=credit,
            recent_chunks=chunks,
            guessed_tokens=guessed,
            adapters=None if request.adapter is None or metrics is None else _adapters(metrics),
            reuse=self._reuse(name),
        )


def _adapters(metrics: EngineMetrics) -> Adapters | None:
    """What an engine says about its adapters."""
    if metrics.adapters is None:
        return None
    return Adapters(names=frozenset(metrics.adapters), most=metrics.most_adapters)
