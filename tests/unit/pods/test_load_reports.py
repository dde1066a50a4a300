"""The load that SGLang publishes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from matrixinfer.pods.load_reports import MAX_BYTES, parse_load

FULL: list[Any] = ["LoadStat", 3, 2, 100, 1000, 1, 40, 180, 64, 5000, 1_500_000]


def encoded(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def test_a_report_of_0_5_23_is_read() -> None:
    report = parse_load(encoded(FULL), read_at=7.0)
    assert report is not None
    assert (report.running, report.waiting, report.cache_usage, report.rank) == (3, 2, 0.1, 1)
    assert (report.uncached_tokens, report.prefill_busy_seconds, report.read_at) == (40, 1.5, 7.0)


def test_shorter_and_longer_reports_are_read() -> None:
    short, long = parse_load(encoded(FULL[:5]), read_at=0.0), parse_load(encoded([*FULL, 1, "new"]), read_at=0.0)
    assert short is not None
    assert (short.running, short.rank, short.uncached_tokens) == (3, None, 0)
    assert long == parse_load(encoded(FULL), read_at=0.0)


def test_a_usage_without_capacity_is_unknown_and_never_more_than_all() -> None:
    unknown, over = (
        parse_load(encoded(["LoadStat", 0, 0, used, most]), read_at=0.0) for used, most in ((5, 0), (9, 8))
    )
    assert unknown is not None
    assert unknown.cache_usage is None
    assert over is not None
    assert over.cache_usage == 1.0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encoded(["Other", 1, 2, 3, 4]),
        encoded(["LoadStat", 1, 2]),
        encoded(["LoadStat", -1, 2, 3, 4]),
        encoded(["LoadStat", "1", 2, 3, 4]),
        encoded(["LoadStat", 2**60, 2, 3, 4]),
        encoded({"type": "LoadStat"}),
        encoded(["LoadStat", 1, 2, 3, 4, 0, b"x" * MAX_BYTES]),
    ],
)
def test_what_is_no_report_is_refused(payload: bytes) -> None:
    assert parse_load(payload, read_at=0.0) is None
