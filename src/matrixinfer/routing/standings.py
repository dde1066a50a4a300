"""What is known of every endpoint whatever the request: its load, its engine's metrics, its cache.

It changes with events, scrapes, and requests that begin or end there, so a decision finds most of it as the last one left it.
"""

from __future__ import annotations

from collections.abc import Callable

from matrixinfer.pods.load_reports import FRESH_SECONDS, LoadReport
from matrixinfer.pods.registry import Endpoint, EngineMetrics, PodRegistry, RankMetrics
from matrixinfer.routing.observed import Observed
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.message import Load
from matrixinfer.traffic.pod_load import View
from matrixinfer.trust.cache_views import Caches, CacheView


class Standing:
    """One endpoint, as a candidate that holds nothing of a prompt, and what that rests on."""

    __slots__ = ("cache", "candidate", "endpoint", "load", "metrics", "others", "report", "reuse", "until", "waits")

    def __init__(self, endpoint: Endpoint, cache: CacheView | None, load: View, others: Load, reuse: float) -> None:
        self.endpoint = endpoint
        self.cache = cache
        self.load = load
        self.others = others
        self.reuse = reuse
        self.metrics = endpoint.pod.metrics
        self.report: LoadReport | None = None
        self.candidate = Candidate(name=endpoint.name, url=endpoint.pod.url)
        self.until = float("-inf")
        """It holds until then, unless something that it rests on is another one by then."""
        self.waits = 0
        """Requests of others in the engine's queue."""


class Standings:
    """Keeps the standing of each endpoint. `reuse` gives `Candidate.reuse`."""

    def __init__(
        self,
        registry: PodRegistry,
        caches: Caches,
        load: LoadLedger,
        observed: Observed,
        reuse: Callable[[str], float] = lambda _: 1.0,
    ) -> None:
        self._registry = registry
        self._caches = caches
        self._load = load
        self._observed = observed
        self._reuse = reuse
        self._standings: dict[str, Standing] = {}

    def forget(self, name: str) -> None:
        """An endpoint has gone."""
        self._standings.pop(name, None)

    def of(self, endpoint: Endpoint, others: Load, now: float) -> Standing:
        """The standing of an endpoint that has the load `others` of other gateways. The same object while nothing changes."""
        name, pod = endpoint.name, endpoint.pod
        kept, cache, load = self._standings.get(name), self._caches.of(name), self._load.view(name, now)
        reuse = self._reuse(name)
        if (
            kept is not None
            and kept.load is load
            and kept.cache is cache
            and now < kept.until
            and kept.metrics is pod.metrics
            and kept.endpoint is endpoint
            and kept.reuse == reuse
            and kept.others == others
            and (not pod.loads or kept.report is pod.loads.get(name))
        ):
            return kept
        kept = self._standings[name] = Standing(endpoint, cache, load, others, reuse)
        self._fill(kept, now)
        return kept

    def _fill(self, standing: Standing, now: float) -> None:
        endpoint, cache, own, others = standing.endpoint, standing.cache, standing.load, standing.others
        name, pod, seen = endpoint.name, endpoint.pod, self._observed.of(endpoint.name)
        metrics, report = self._registry.metrics_of(pod, now), self._registry.load_of(endpoint, now)
        engine: EngineMetrics | RankMetrics | LoadReport | None = report
        if engine is None:
            engine = metrics if metrics is None or endpoint.rank is None else metrics.ranks.get(endpoint.rank)
        read, until = report or metrics, float("inf")
        running, waiting = (None, None) if engine is None else (engine.running, engine.waiting)
        foreign = None
        if read is not None and running is not None:
            foreign = self._observed.foreign(name, running + (waiting or 0), read.read_at, now)
            standing.waits = min(waiting or 0, foreign)
            until = seen.again_at
        condition = self._observed.condition(
            name,
            now,
            rate=own.rate,
            footprint=None if cache is None else cache.footprint,
            reported=None if metrics is None else metrics.cache_tokens,
        )
        until = min(until, seen.due)
        if metrics is not None:
            until = min(until, self._registry.fresh_until(metrics))
        if report is not None:
            until = min(until, report.read_at + FRESH_SECONDS)
        engine_block = None if cache is None else cache.engine_block
        if engine_block is None and metrics is not None:
            engine_block = metrics.block_size
        queue_seconds = own.queue_seconds
        if others.queued_tokens:
            queue_seconds += others.queued_tokens / own.rate
        standing.report, standing.until = pod.loads.get(name), until
        standing.candidate = Candidate(
            name=name,
            url=pod.url,
            rank=endpoint.rank,
            in_flight=own.in_flight + others.in_flight,
            queued_tokens=own.queued_tokens + others.queued_tokens,
            peers_in_flight=others.in_flight,
            foreign=foreign,
            queue_seconds=queue_seconds,
            condition=condition,
            running=running,
            waiting=waiting,
            cache_usage=None if engine is None else engine.cache_usage,
            metrics_age=None if read is None else now - read.read_at,
            feed=None if cache is None else cache.feed,
            trust="none" if cache is None else cache.trust,
            engine_block=engine_block,
            matched_blocks=0,
            dropped_tokens=0 if cache is None else cache.drop,
            reuse=standing.reuse,
        )
