"""The section `tracing`: spans of requests, sent to a collector."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from matrixinfer.config.base import Count, Seconds, Section, Share, described
from matrixinfer.errors import ConfigError

TRACES_PATH = "/v1/traces"


class TracingConfig(Section, frozen=True):
    """OpenTelemetry traces of requests (extra `otel`)."""

    enabled: Annotated[
        bool,
        described(
            "Whether to trace requests. If not, clients' `traceparent` and `tracestate` go to engines unchanged."
        ),
    ] = False
    endpoint: Annotated[
        str,
        described(
            "Base URL of a collector that takes OTLP over HTTP as protobuf; `/v1/traces` is added. Headers that it requires "
            "come from the environment variable `OTEL_EXPORTER_OTLP_HEADERS`."
        ),
    ] = "http://127.0.0.1:4318"
    sample_ratio: Annotated[
        Share,
        described(
            "Share of the traces that begin here which are recorded. A client that sends `traceparent` decides about its own."
        ),
    ] = 1.0
    service_name: Annotated[
        str,
        described("`service.name` of the spans. `OTEL_RESOURCE_ATTRIBUTES` may add other attributes."),
    ] = "matrixinfer-gateway"
    queue_spans: Annotated[
        Count, described("Most spans that wait to be sent. Further ones are dropped and counted.")
    ] = 4096
    batch_spans: Annotated[Count, described("Most spans that are sent at once.")] = 256
    interval_seconds: Annotated[Seconds, described("Longest time that a span waits for others.")] = 2.0
    timeout_seconds: Annotated[
        Seconds, described("After which time a batch that the collector has not taken, retries included, is lost.")
    ] = 10.0

    @property
    def url(self) -> str:
        """Where spans are sent."""
        base = self.endpoint.rstrip("/")
        return base if base.endswith(TRACES_PATH) else base + TRACES_PATH


def check_tracing(config: TracingConfig) -> None:
    """Raises `ConfigError` for an endpoint that is no base URL, and for bounds that contradict each other."""
    path = "$.tracing.endpoint"
    try:
        parts = urlsplit(config.endpoint)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or re.search(r"[?#\s]", config.endpoint):
        raise ConfigError(path, f"expected `http://host:port`, got `{config.endpoint}`")
    if "@" in parts.netloc:
        raise ConfigError(
            path,
            "expected a URL without a user name and password, as it shows in logs: set the header that the collector requires "
            "in the environment variable `OTEL_EXPORTER_OTLP_HEADERS`",
        )
    if config.batch_spans > config.queue_spans:
        raise ConfigError(
            "$.tracing.batchSpans",
            f"expected at most `tracing.queueSpans` ({config.queue_spans}), got {config.batch_spans}",
        )
