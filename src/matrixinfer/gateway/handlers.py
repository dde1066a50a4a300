"""Probes, metrics, and the admin pages about decisions, pods and tokenizers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from matrixinfer.errors import IndexUnavailable, InvalidRequest
from matrixinfer.gateway import headers
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.responses import json_response
from matrixinfer.pods.load_reports import LoadReport
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.routing.decision_log import DecisionLog
from matrixinfer.routing.router import Router
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.cache_views import FeedReports
from matrixinfer.trust.parity import Parity

log = structlog.get_logger(__name__)


class Status:
    """Liveness, readiness and metrics, on both listeners. `missing` names what else keeps the process from being ready."""

    def __init__(
        self,
        registry: PodRegistry,
        metrics: Metrics,
        draining: asyncio.Event,
        *,
        missing: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._missing = missing
        self._registry = registry
        self._metrics = metrics
        self._draining = draining

    def routes(self) -> Routes:
        """Paths of probes and scrapers."""
        return {
            "/health": {"GET": self.health},
            "/ready": {"GET": self.ready},
            "/metrics": {"GET": self.expose},
        }

    async def health(self, _: web.BaseRequest) -> web.StreamResponse:
        """The process is alive."""
        return json_response({"status": "ok"})

    async def ready(self, _: web.BaseRequest) -> web.StreamResponse:
        """The process can do its work: a pod is healthy, nothing else is missing, and it is not draining."""
        if self._draining.is_set():
            return json_response({"status": "draining"}, status=503)
        if not self._registry.any_healthy():
            return json_response({"status": "no healthy pod"}, status=503)
        missing = self._missing()
        if missing is not None:
            return json_response({"status": missing}, status=503)
        return json_response({"status": "ready"})

    async def expose(self, _: web.BaseRequest) -> web.StreamResponse:
        """Prometheus metrics."""
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


class Admin:
    """Pages for operators, on the admin listener only."""

    def __init__(
        self,
        router: Router,
        registry: PodRegistry,
        decisions: DecisionLog,
        feeds: FeedReports,
        outliers: Outliers,
        parity: Parity,
        bodies: Bodies,
        sources: Callable[[], Mapping[str, Mapping[str, object]]] = dict,
        unmatched: Callable[[], Awaitable[Sequence[Mapping[str, object]]]] | None = None,
    ) -> None:
        self._sources = sources
        self._unmatched = unmatched
        self._router = router
        self._registry = registry
        self._decisions = decisions
        self._feeds = feeds
        self._outliers = outliers
        self._parity = parity
        self._bodies = bodies

    def routes(self) -> Routes:
        """Paths of the admin listener."""
        return {
            "/debug/route": {"POST": self.explain},
            "/debug/decisions": {"GET": self.decisions},
            "/debug/pods": {"GET": self.pods},
            "/debug/tokenizers": {"GET": self.tokenizers},
            "/debug/index": {"GET": self.index},
        }

    async def explain(self, request: web.BaseRequest) -> web.StreamResponse:
        """Where this body would go if it came to `?path=…`, and why. Changes nothing."""
        path = request.rel_url.query.get("path", CHAT_PATH)
        with self._bodies.hold() as held:
            body = await self._bodies.read(request, held)
            session = headers.session_id(request.headers)
            return json_response(await self._router.explain(path, body, session=session, headers=request.headers))

    async def decisions(self, request: web.BaseRequest) -> web.StreamResponse:
        """The last decisions, newest first: `?limit=`, and `?id=` of a request or `?pod=` that answered it."""
        query = request.rel_url.query
        limit = query.get("limit", "100")
        if not re.fullmatch(r"[0-9]{1,9}", limit):
            raise InvalidRequest(f"limit: expected a number of up to 9 digits, got `{limit[:20]}`", param="limit")
        found = self._decisions.newest(request_id=query.get("id"), pod=query.get("pod"))
        return json_response({"decisions": [record.view() for record in islice(found, int(limit))]})

    async def pods(self, _: web.BaseRequest) -> web.StreamResponse:
        """Every pod as last seen."""
        now = self._registry.clock()
        return json_response(
            {
                "pods": [
                    {**_pod(pod, now), "withheld": self._withheld(pod), "feeds": self._feeds.of(pod)}
                    for pod in self._registry.pods
                ]
            }
        )

    def _withheld(self, pod: Pod) -> Mapping[str, str]:
        """Why endpoints of a pod get no requests, or only a probe."""
        reasons = ((endpoint.name, self._outliers.reason(endpoint.name)) for endpoint in pod.endpoints)
        return {name: reason for name, reason in reasons if reason is not None}

    async def index(self, _: web.BaseRequest) -> web.StreamResponse:
        """Why lookups of some models never match in an index that others write; `unmatched` is null for other indexes."""
        try:
            unmatched = None if self._unmatched is None else await self._unmatched()
        except IndexUnavailable as error:
            return json_response({"error": {"message": str(error)}}, status=503)
        return json_response({"unmatched": unmatched})

    async def tokenizers(self, _: web.BaseRequest) -> web.StreamResponse:
        """Where each model's token ids come from, and how they compare with its engines'."""
        sources, compared = self._sources(), self._parity.view()
        models = {**dict.fromkeys(sources), **dict.fromkeys(compared)}
        return json_response(
            {"tokenizers": {name: {**sources.get(name, {}), **compared.get(name, {})} for name in models}}
        )


def _load(report: LoadReport, now: float) -> Mapping[str, object]:
    return {
        "running": report.running,
        "waiting": report.waiting,
        "cache_usage": report.cache_usage,
        "uncached_tokens": report.uncached_tokens,
        "prefill_busy_seconds": report.prefill_busy_seconds,
        "age_s": round(now - report.read_at, 3),
    }


def _pod(pod: Pod, now: float) -> Mapping[str, object]:
    served, metrics = pod.served, pod.metrics
    return {
        "name": pod.name,
        "url": pod.url,
        "healthy": pod.healthy,
        "failures": pod.failures,
        "model": pod.base_model,
        "aliases": None if served is None else sorted(served.aliases),
        "adapters": None if served is None else dict(served.adapters),
        "engine": pod.engine,
        "version": None if pod.facts is None else pod.facts.version,
        "asleep": pod.asleep,
        "ranks": pod.rank_count,
        "kv_sources": pod.kv_sources,
        "metrics": None
        if metrics is None
        else {
            "running": metrics.running,
            "waiting": metrics.waiting,
            "cache_usage": metrics.cache_usage,
            "age_s": round(now - metrics.read_at, 3),
        },
        "published_load": {name: _load(report, now) for name, report in pod.loads.items()},
    }
