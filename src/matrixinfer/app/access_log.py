"""Opens the access log, if the configuration names one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.config import Config
from matrixinfer.gateway.access_log import RequestLog
from matrixinfer.telemetry.access_log import AccessLog
from matrixinfer.telemetry.metrics import Metrics


class AccessLogCollector(Collector):
    """Lines of the access log."""

    def __init__(self, access_log: AccessLog) -> None:
        self._log = access_log

    def collect(self) -> Iterator[Metric]:
        """Read the counts now."""
        lines = CounterMetricFamily("matrixinfer_access_log_lines", "Lines of the access log.", labels=["outcome"])
        lines.add_metric(["written"], self._log.written)
        lines.add_metric(["dropped"], self._log.dropped)
        yield lines


async def open_access_log(config: Config, metrics: Metrics, stack: AsyncExitStack) -> RequestLog | None:
    """The access log, which `stack` closes. Raises `ConfigError` if its file cannot be opened."""
    if config.access_log is None:
        return None
    sink = await stack.enter_async_context(AccessLog(config.access_log))
    metrics.register(AccessLogCollector(sink))
    return RequestLog(sink, is_chained=config.blocks.scheme == "prefix")
