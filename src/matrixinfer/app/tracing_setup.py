"""Begins to trace requests, if the configuration says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer import __version__
from matrixinfer.config import Config
from matrixinfer.errors import ConfigError
from matrixinfer.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from matrixinfer.gateway.request_trace import RequestTraces
    from matrixinfer.telemetry.tracing import SpanExport


class SpanCollector(Collector):
    """Spans of requests."""

    def __init__(self, spans: SpanExport) -> None:
        self._spans = spans

    def collect(self) -> Iterator[Metric]:
        """Read the counts now."""
        spans = CounterMetricFamily("matrixinfer_trace_spans", "Spans of requests, by outcome.", labels=["outcome"])
        spans.add_metric(["exported"], self._spans.exported)
        spans.add_metric(["failed"], self._spans.failed)
        spans.add_metric(["dropped"], self._spans.dropped)
        yield spans


async def open_tracing(config: Config, metrics: Metrics, stack: AsyncExitStack) -> RequestTraces | None:
    """What traces requests, which `stack` closes; None if nothing does. Raises `ConfigError` without the extra."""
    if not config.tracing.enabled:
        return None
    try:
        from matrixinfer.gateway.request_trace import RequestTraces  # noqa: PLC0415 - needs an extra
        from matrixinfer.telemetry.tracing import SpanExport  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError("$.tracing.enabled", "needs an extra: pip install 'matrixinfer-gateway[otel]'") from error
    spans = await stack.enter_async_context(SpanExport(config.tracing, __version__))
    metrics.register(SpanCollector(spans))
    return RequestTraces(spans.tracer)
