"""The snapshot that a decision is taken on: every endpoint of a model, what it holds of the prompt, how loaded it is."""

from __future__ import annotations

from collections.abc import Sequence

from matrixinfer.config import WeightsConfig
from matrixinfer.pods.registry import Endpoint, EngineMetrics, Pod, PodRegistry, RankMetrics
from matrixinfer.routing.lookup import Lookup, Matches
from matrixinfer.scheduler.credit import cached_credit
from matrixinfer.scheduler.framework import Candidate, SchedulingRequest
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.traffic.peers.message import Load
from matrixinfer.trust.drift import Drift
from matrixinfer.trust.parity import Parity


class Fleet:
    """Puts candidates together from what each part knows of them, and has all parts forget those that are gone."""

    def __init__(
        self,
        *,
        registry: PodRegistry,
        lookup: Lookup,
        load: LoadLedger,
        history: RoutingHistory,
        drift: Drift,
        parity: Parity,
        metrics: Metrics,
        weights: WeightsConfig,
        peers: PeerLoads,
    ) -> None:
        self._registry = registry
        self._lookup = lookup
        self._load = load
        self._history = history
        self._drift = drift
        self._parity = parity
        self._metrics = metrics
        self._weights = weights
        self._peers = peers

    def candidates(
        self,
        request: SchedulingRequest,
        pods: Sequence[Pod],
        matches: Matches | None,
        *,
        reads_cache: bool,
        approximate: bool,
    ) -> list[Candidate]:
        """The endpoints of `pods` at this moment, of those pods that have not left meanwhile. Nothing changes.

        `matches` is what the index says of the prompt, None when it could not be asked. With `approximate` its token ids
        are not the engines', so that only what was sent counts; one that does not read caches (`reads_cache`) gains
        nothing from either.
        """
        endpoints = (endpoint for pod in pods if not pod.gone for endpoint in pod.endpoints)
        if approximate:
            matches = None
        others = self._peers.totals(request.now)
        return [
            self._candidate(endpoint, request, matches, reads_cache, approximate, others.get(endpoint.name, _NONE))
            for endpoint in endpoints
        ]

    def forget(self, endpoint: str) -> None:
        """An endpoint is gone: what was counted and remembered of it goes too."""
        self._load.forget(endpoint)
        self._history.forget(endpoint)
        self._drift.forget(endpoint)
        self._metrics.forget_pod(endpoint)

    def keep_models(self) -> None:
        """Models that nobody serves any more are forgotten."""
        served = self._registry.names()
        self._parity.keep_models(served)
        self._metrics.keep_models(served)

    def finished(self, tried: Sequence[Candidate]) -> None:
        """A request is over that was at these endpoints: what its answer has left behind of those that are gone goes."""
        for each in tried:
            if not self._registry.has(each.pod, each.name):
                self.forget(each.name)

    def _candidate(
        self,
        endpoint: Endpoint,
        request: SchedulingRequest,
        matches: Matches | None,
        reads_cache: bool,
        approximate: bool,
        others: Load,
    ) -> Candidate:
        name, load = endpoint.name, self._load
        cache, match, tail, tiers = self._lookup.held(name, matches)
        trust = "none" if approximate or cache is None else cache.trust
        pending = load.pending(name, request.model, request.chain, match or 0) if reads_cache else 0
        recent = self._history.match(name, request.model, request.chain) if reads_cache and trust != "exact" else 0
        metrics = self._registry.metrics_of(endpoint.pod, request.now)
        shown: EngineMetrics | RankMetrics | None = metrics
        if metrics is not None and endpoint.rank is not None:
            shown = metrics.ranks.get(endpoint.rank)
        engine_block = None if cache is None else cache.engine_block
        if engine_block is None and metrics is not None:
            engine_block = metrics.block_size
        return Candidate(
            name=name,
            url=endpoint.pod.url,
            rank=endpoint.rank,
            in_flight=load.in_flight(name) + others.in_flight,
            queued_tokens=load.queued_tokens(name) + others.queued_tokens,
            peers_in_flight=others.in_flight,
            running=shown.running if shown else None,
            waiting=shown.waiting if shown else None,
            cache_usage=shown.cache_usage if shown else None,
            metrics_age=request.now - metrics.read_at if metrics else None,
            feed=None if cache is None else cache.feed,
            trust=trust,
            engine_block=engine_block,
            matched_blocks=match,
            matched_tail=tail,
            tiers=tiers,
            pending_blocks=pending,
            recent_blocks=recent,
            cached_credit=None
            if trust == "exact" and not tiers
            else cached_credit(trust, self._weights, match=match or 0, tiers=tiers, pending=pending, recent=recent),
        )


_NONE = Load(0, 0)
