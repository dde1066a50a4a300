"""The table that `matrixinfer demo` prints."""

from __future__ import annotations

from typing import Any

import pytest

from matrixinfer.cli.demo import Summary, print_comparison


def summary(**values: Any) -> Summary:
    fields: Any = dict.fromkeys(("hit_rate", "ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "ttft_ratio"))
    result: Summary = fields | {"requests": 216, "errors": 0, "pods": {}} | values
    return result


def test_the_comparison_has_a_row_per_policy_and_the_names_of_the_json_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = summary(hit_rate=0.496, ttft_mean_ms=591.2, ttft_p50_ms=507.0, ttft_p99_ms=1768.4, ttft_ratio=1.0)
    fast = summary(hit_rate=0.78, ttft_mean_ms=240.1, ttft_p50_ms=229.0, ttft_p99_ms=661.0, ttft_ratio=2.46)
    print_comparison({"round_robin": slow, "kv_aware": fast}, engines=4)
    title, *table = (line.split() for line in capsys.readouterr().out.splitlines()[:4])
    assert " ".join(title) == "The same 216 requests to 4 engines, routed two ways:"
    assert table == [
        ["policy", "hit_rate", "ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "ttft_ratio"],
        ["round_robin", "49.6%", "591", "507", "1,768", "1.0x"],
        ["kv_aware", "78.0%", "240", "229", "661", "2.5x"],
    ]


def test_failed_requests_are_reported_and_missing_values_shown_as_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison({"round_robin": summary(errors=216), "kv_aware": summary()}, engines=4)
    out = capsys.readouterr().out
    assert out.splitlines()[2].split() == ["round_robin", *"-----"]
    assert out.endswith("round_robin: 216 of 216 requests failed\n")
