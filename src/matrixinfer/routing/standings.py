"""What is known of every endpoint whatever the request: its load, its engine's metrics, its cache.

It changes with events, scrapes, and requests that begin or end there, so a decision finds most of it as the last one left it.
"""

from __future__ import annotations

from collections.abc import Callable

from matrixinfer.pods.load_reports import FRESH_SECONDS, LoadReport
from matrixinfer.pods.registry import Endpoint, EngineMetrics, PodRegistry, RankMetrics
from matrixinfer.routing.observed import Observed
from matrixinfer.scheduler.framework import Candidate, Condition
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.message import Load
from matrixinfer.traffic.pod_load import View
from matrixinfer.trust.cache_views import Caches, CacheView

_EVER = float("inf")


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
        endpoint, cache = standing.endpoint, standing.cache
        pod, seen = endpoint.pod, self._observed.of(endpoint.name)
        metrics, report = self._registry.metrics_of(pod, now), self._registry.load_of(endpoint, now)
        engine = report or _gauges(endpoint, metrics)
        read = report or metrics
        foreign = None
        if read is not None and engine is not None and engine.running is not None:
            waiting = engine.waiting or 0
            foreign = self._observed.foreign(endpoint.name, engine.running + waiting, read.read_at, now)
            standing.waits = min(waiting, foreign)
        condition = self._observed.condition(
            endpoint.name,
            now,
            rate=standing.load.rate,
            footprint=None if cache is None else cache.footprint,
            reported=None if metrics is None else metrics.cache_tokens,
        )
        standing.report = pod.loads.get(endpoint.name)
        standing.until = min(
            seen.due,
            _EVER if foreign is None else seen.again_at,
            _EVER if metrics is None else self._registry.fresh_until(metrics),
            _EVER if report is None else report.read_at + FRESH_SECONDS,
        )
        age = None if read is None else now - read.read_at
        standing.candidate = _candidate(standing, metrics, engine, condition, foreign, age)


def _gauges(endpoint: Endpoint, metrics: EngineMetrics | None) -> EngineMetrics | RankMetrics | None:
    return metrics if metrics is None or endpoint.rank is None else metrics.ranks.get(endpoint.rank)


def _candidate(
    standing: Standing,
    metrics: EngineMetrics | None,
    engine: EngineMetrics | RankMetrics | LoadReport | None,
    condition: Condition,
    foreign: int | None,
    age: float | None,
) -> Candidate:
    endpoint, cache, own, others = standing.endpoint, standing.cache, standing.load, standing.others
    engine_block = None if cache is None else cache.engine_block
    if engine_block is None and metrics is not None:
        engine_block = metrics.block_size
    queue_seconds = own.queue_seconds
    if others.queued_tokens:
        queue_seconds += others.queued_tokens / own.rate
    return Candidate(
        name=endpoint.name,
        url=endpoint.pod.url,
        rank=endpoint.rank,
        in_flight=own.in_flight + others.in_flight,
        queued_tokens=own.queued_tokens + others.queued_tokens,
        peers_in_flight=others.in_flight,
        foreign=foreign,
        queue_seconds=queue_seconds,
        condition=condition,
        running=None if engine is None else engine.running,
        waiting=None if engine is None else engine.waiting,
        cache_usage=None if engine is None else engine.cache_usage,
        metrics_age=age,
        feed=None if cache is None else cache.feed,
        trust="none" if cache is None else cache.trust,
        engine_block=engine_block,
        matched_blocks=0,
        dropped_tokens=0 if cache is None else cache.drop,
        reuse=standing.reuse,
    )
