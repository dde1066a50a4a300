"""Sends spans to a collector, from a thread of its own. What cannot be sent is counted and lost; no request waits."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import requests
import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer

from matrixinfer.config import TracingConfig
from matrixinfer.telemetry.intervals import Intervals

_CLOSE_SECONDS = 2.0
"""How long the end of the process waits for spans to be sent."""
_NOTED_SECONDS = 60.0
_MAX_CAUSES = 8

log = structlog.get_logger(__name__)


class SpanExport:
    """Use as an async context manager; leaving it sends what waits, within two seconds."""

    def __init__(self, config: TracingConfig, version: str) -> None:
        self._config = config
        self._version = version
        self._exporter = _Exporter(config)
        self._queue: _BoundedQueue | None = None
        self._provider: TracerProvider | None = None

    async def __aenter__(self) -> Self:
        config = self._config
        self._exporter.open()
        batches = BatchSpanProcessor(
            self._exporter,
            max_queue_size=config.queue_spans,
            max_export_batch_size=config.batch_spans,
            schedule_delay_millis=config.interval_seconds * 1000,
        )
        self._queue = _BoundedQueue(batches, self._exporter, config.queue_spans)
        about: dict[str, str | int] = {
            "service.name": config.service_name,
            "service.version": self._version,
            "process.pid": os.getpid(),
        }
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            resource=Resource.create({**about}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(self._queue)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._provider is None:
            return
        closing = threading.Thread(target=self._provider.shutdown, name="spans-closing", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _CLOSE_SECONDS)
        self._exporter.close()

    @property
    def tracer(self) -> Tracer:
        """Makes spans, while this is open."""
        assert self._provider is not None  # noqa: S101 - nobody asks before the start
        return self._provider.get_tracer("matrixinfer", self._version)

    @property
    def exported(self) -> int:
        """Spans that the collector took."""
        return self._exporter.exported

    @property
    def failed(self) -> int:
        """Spans that it did not take."""
        return self._exporter.failed

    @property
    def dropped(self) -> int:
        """Spans for which there was no room."""
        return 0 if self._queue is None else self._queue.dropped


class _BoundedQueue(SpanProcessor):
    """Passes spans on to `batches` while less than `most` wait, as that would drop others without a word."""

    def __init__(self, batches: BatchSpanProcessor, exporter: _Exporter, most: int) -> None:
        self._batches = batches
        self._exporter = exporter
        self._most = most
        self._taken = 0
        self.dropped = 0

    def on_end(self, span: ReadableSpan) -> None:
        """A span is over. Called on the event loop's thread only."""
        if self._taken - self._exporter.exported - self._exporter.failed >= self._most:
            self.dropped += 1
            self._exporter.dropped = self.dropped
            return
        self._taken += 1
        self._batches.on_end(span)

    def shutdown(self) -> None:
        """Send what waits."""
        self._batches.shutdown()  # type: ignore[no-untyped-call]


class _Exporter(SpanExporter):
    """Counts what the collector takes. Only the thread that sends calls `export`."""

    def __init__(self, config: TracingConfig) -> None:
        self._config = config
        self._session = _Session()
        self._library = logging.getLogger("opentelemetry")
        self._silence = logging.NullHandler()
        self._may_log = Intervals(_NOTED_SECONDS, time.monotonic)
        self._inner: OTLPSpanExporter | None = None
        self.exported = 0
        self.failed = 0
        self.dropped = 0
        """As the queue counts, for the log."""

    def open(self) -> None:
        """Begin. From now on the library logs nothing: it says each thing several times, and we say it once."""
        self._library.addHandler(self._silence)
        self._library.propagate = False
        self._inner = OTLPSpanExporter(
            endpoint=self._config.url, timeout=self._config.timeout_seconds, session=self._session
        )

    def close(self) -> None:
        """Send nothing more, and give up what is being tried again."""
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.shutdown()  # type: ignore[no-untyped-call]
        self._library.removeHandler(self._silence)
        self._library.propagate = not self._library.handlers

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        inner = self._inner
        result = SpanExportResult.FAILURE if inner is None else inner.export(spans)
        if result is SpanExportResult.SUCCESS:
            self.exported += len(spans)
            return result
        self.failed += len(spans)
        if self._may_log("failed"):
            log.warning(
                "spans_export_failed",
                endpoint=self._config.endpoint,
                reason=self._session.reason,
                failed=self.failed,
                dropped=self.dropped,
            )
        return result

    def shutdown(self) -> None:
        """Left to `close`, which has a deadline."""


class _Session(requests.Session):
    """Remembers how the last request ended."""

    reason = "not tried"

    def send(self, request: requests.PreparedRequest, **settings: Any) -> requests.Response:
        try:
            response = super().send(request, **settings)
        except requests.RequestException as error:
            self.reason = _cause(error)
            raise
        self.reason = f"status {response.status_code}"
        return response


def _cause(error: BaseException) -> str:
    """What the system said, or the kind of the error: its message would quote addresses again and again."""
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None:
            break
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
