"""What happens to spans between their end and the collector."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from matrixinfer.app.tracing_setup import open_tracing
from matrixinfer.config import Config, TracingConfig, parse
from matrixinfer.errors import ConfigError
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.tracing import SpanExport
from tests.collector import collector
from tests.waiting import eventually


def config(url: str, **settings: float) -> TracingConfig:
    return TracingConfig(enabled=True, endpoint=url, interval_seconds=3600.0, **settings)  # type: ignore[arg-type]


async def test_what_waits_at_the_end_is_sent() -> None:
    async with collector() as kept:
        async with SpanExport(config(kept.url), "1.2") as spans:
            for _ in range(3):
                spans.tracer.start_span("a").end()
            assert spans.exported == 0
        assert len(kept.named("a")) == spans.exported == 3
        assert kept.resource["service.version"] == "1.2"


async def test_the_end_does_not_wait_for_a_collector_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matrixinfer.telemetry.tracing._CLOSE_SECONDS", 0.2)
    async with collector() as kept:
        kept.status = 503
        with capture_logs() as logs:
            async with SpanExport(config(kept.url, timeout_seconds=3600.0), "1") as spans:
                for _ in range(5):
                    spans.tracer.start_span("a").end()
            await eventually(lambda: spans.failed == 5)
        (line,) = logs
        assert (line["event"], line["reason"], line["failed"]) == ("spans_export_failed", "status 503", 5)


async def test_headers_for_the_collector_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20sk-1")
    async with collector() as kept:
        async with SpanExport(config(kept.url), "1") as spans:
            spans.tracer.start_span("a").end()
        assert kept.headers["authorization"] == "Bearer sk-1"


async def test_the_library_logs_nothing_meanwhile_and_may_do_so_again_afterwards() -> None:
    library = logging.getLogger("opentelemetry")
    async with SpanExport(config("http://127.0.0.1:9"), "1"), SpanExport(config("http://127.0.0.1:9"), "1"):
        assert not library.propagate
    assert library.propagate


async def test_without_the_extra_the_start_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matrixinfer.telemetry.tracing", None)
    with pytest.raises(ConfigError, match=r"tracing.enabled.*pip install 'matrixinfer-gateway\[otel\]'"):
        await open_tracing(Config(tracing=config("http://127.0.0.1:9")), Metrics(), None)  # type: ignore[arg-type]


async def test_nothing_is_opened_unless_it_is_enabled() -> None:
    assert await open_tracing(Config(), Metrics(), None) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("endpoint: collector:4317", r"\$\.tracing\.endpoint: expected `http://host:port`, got `collector:4317`"),
        ("endpoint: http://host:0", r"\$\.tracing\.endpoint"),
        ("endpoint: 'http://host:1?token=a'", r"\$\.tracing\.endpoint"),
        ("endpoint: http://user:pass@host:1", "without a user name and password.*OTEL_EXPORTER_OTLP_HEADERS"),
        ("sampleRatio: 1.5", r"\$\.tracing\.sampleRatio"),
        ("queueSpans: 10", r"\$\.tracing\.batchSpans: expected at most `tracing.queueSpans` \(10\), got 256"),
        ("sample: 0.5", r"\$\.tracing"),
    ],
)
def test_a_bad_setting_is_refused_with_its_path(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        parse(f"tracing: {{{text}}}", base=Path())
    assert "pass@" not in str(refused.value)


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("https://c/otlp/", "https://c/otlp/v1/traces"),
        ("https://c/v1/traces", "https://c/v1/traces"),
    ],
)
def test_spans_go_to_the_path_for_traces(endpoint: str, url: str) -> None:
    assert TracingConfig(endpoint=endpoint).url == url
