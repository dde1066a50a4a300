"""Metrics of who may send requests, how much, and in which order."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from matrixinfer.telemetry.children import Children

OTHER_TENANTS = "other"
_MAX_TENANTS = 1000
_WAIT_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)


class AccessMetrics:
    """Counters and gauges in the registry of a gateway's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._refused = Children(
            Counter(
                "matrixinfer_access_refused",
                "Requests refused before they were routed, by reason.",
                ["reason"],
                registry=registry,
            )
        )
        self._tenant_tokens = Children(
            Counter(
                "matrixinfer_tenant_tokens",
                "Tokens that engines reported for a tenant's requests; `cached` is a part of `input`.",
                ["tenant", "kind"],
                registry=registry,
            )
        )
        self._tenants: set[str] = set()
        self._limits_degraded = Gauge(
            "matrixinfer_limits_degraded",
            "1 while each gateway counts on its own what keys use, because Redis does not answer.",
            registry=registry,
        )
        self._admission = Children(
            Gauge(
                "matrixinfer_admission_requests",
                "Requests that are let through to engines, and requests that wait for that.",
                ["state"],
                registry=registry,
            )
        )
        self._wait = Histogram(
            "matrixinfer_admission_wait_seconds",
            "Time that requests waited until they were let through.",
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self._shed = Children(
            Counter(
                "matrixinfer_admission_shed",
                "Requests that were not let through, by reason.",
                ["reason"],
                registry=registry,
            )
        )

    def refused(self, reason: str) -> None:
        """A request was refused because of who sent it, or how much was sent."""
        self._refused[reason,].inc()

    def tenant_used(self, tenant: str, input_tokens: int, cached_tokens: int | None, output_tokens: int | None) -> None:
        """An engine has reported what a tenant's request has used. Tenants beyond the first thousand share a label."""
        if tenant not in self._tenants:
            if len(self._tenants) >= _MAX_TENANTS:
                tenant = OTHER_TENANTS
            self._tenants.add(tenant)
        for kind, count in (("input", input_tokens), ("cached", cached_tokens or 0), ("output", output_tokens or 0)):
            self._tenant_tokens[tenant, kind].inc(count)

    def limits_degraded(self, is_degraded: bool) -> None:
        """From now on each gateway counts on its own, or all together again."""
        self._limits_degraded.set(is_degraded)

    def admission(self, running: int, waiting: int) -> None:
        """So many requests are let through, and so many wait."""
        self._admission["running",].set(running)
        self._admission["waiting",].set(waiting)

    def admitted(self, seconds: float) -> None:
        """A request was let through after this long."""
        self._wait.observe(seconds)

    def shed(self, reason: str) -> None:
        """A request was not let through.

        The queue was `full`, it would have waited too long (`late`), it did (`timeout`), or it had to go for a tenant with
        less in the queue (`displaced`).
        """
        self._shed[reason,].inc()
