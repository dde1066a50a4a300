"""The demo, as a command."""

from __future__ import annotations

import json
import subprocess
import sys


def test_the_demo_shows_kv_aware_routing_ahead_of_round_robin() -> None:
    arguments = ["demo", "--json", "--conversations", "8", "--turns", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "matrixinfer", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    policies, ladders = shown["policies"], shown["ladders"]
    assert list(policies) == ["round_robin", "kv_aware"]
    for figures in policies.values():
        assert set(figures) == {
            *("hit_rate", "ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "ttft_ratio", "requests", "errors", "pods")
        }
        assert figures["requests"] == sum(figures["pods"].values()) == 32
        assert figures["errors"] == 0
    assert policies["round_robin"]["ttft_ratio"] == 1
    assert list(ladders) == ["round_robin", "kv_aware"]
    for name, ladder in ladders.items():
        shares = [rung["share"] for rung in ladder["rungs"]]
        assert sorted(shares[:4], reverse=True) == shares[:4]
        assert abs(shares[-1] - policies[name]["hit_rate"]) < 0.02
        assert ladder["requests"] == ladder["reported_requests"] == 32
    assert policies["kv_aware"]["hit_rate"] > policies["round_robin"]["hit_rate"] + 0.1
