"""The matrix of an evaluation: fleets that fit a trace, results that are kept, and the page about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from matrixinfer.study import evaluate, matrix
from matrixinfer.study.charts import charts
from matrixinfer.study.matrix import BOUNDS, CONDITIONS, OURS, USUAL, Cell, demand, fleet, geometric_mean, regrets
from matrixinfer.study.page import page
from matrixinfer.study.policies import POLICIES
from matrixinfer.study.presets import preset
from tests.unit.study.support import chats


def cell(policy: str, ttft: float, *, trace: str = "t", condition: str = USUAL, hits: float = 0.5) -> Cell:
    results = {"hit_rate": hits, "ttft_mean_s": ttft, "ttft_p90_s": ttft * 2}
    return Cell(trace=trace, condition=condition, policy=policy, results=results)


def test_a_fleet_holds_its_share_of_the_trace_and_its_longest_request() -> None:
    trace = chats(sessions=200)
    shape = preset("llama-8b-h100").shape(trace.block_size)
    needs = demand(trace, shape)
    for condition in CONDITIONS:
        on = fleet(trace, shape, needs, condition)
        least = 3 * needs.longest * on.pods
        assert on.pod_tokens * on.pods == pytest.approx(max(condition.cache * needs.distinct_tokens, least), rel=0.01)
        assert all(0 < fault.at < needs.seconds for fault in on.faults if fault.kind in ("restart", "forget"))
    large = next(each for each in CONDITIONS if each.name == "large caches")
    assert fleet(trace, shape, needs, large).pod_tokens > 3 * needs.longest


def test_regret_is_against_the_best_policy_that_is_no_bound() -> None:
    cells = [cell("kv_aware", 3.0), cell("lmetric", 2.0), cell("pooled", 1.0)]
    found = regrets(cells)
    assert [found[name][0][0] for name in ("kv_aware", "lmetric", "pooled")] == [1.5, 1.0, 0.5]
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_the_page_says_where_our_profiles_lose_and_to_whom() -> None:
    cells = [cell("kv_aware", 3.0, hits=0.4), cell("lmetric", 2.0, hits=0.7), cell("pooled", 1.0)]
    cells += [cell(name, 2.0, condition="2 gateways") for name in ("kv_aware", "lmetric", "pooled")]
    text = page(cells, {"t": "7 requests."}, "e")
    assert f"| t | {USUAL} | 1.50 | lmetric | 0.400, 0.700 |" in text
    assert "| **kv_aware** | 1.225 | 1.50 |" in text
    assert "- `kv_aware` is best, or within 5 % of the best, in mean time to first token in 1 of 2 cells," in text
    assert f"- Its worst cell is t, {USUAL}: 1.50 times the best." in text
    assert "### t\n\n7 requests.\n" in text
    assert "| lmetric | 0.500 / 2 |" in text
    assert [line for line in text.splitlines() if len(line) > 100 and not line.startswith("|")] == []


def test_the_charts_show_every_cell_and_stay_small(tmp_path: Path) -> None:
    cells = [
        cell(policy, 1.0 + number, trace=trace, condition=condition)
        for trace in ("s", "t")
        for condition in (USUAL, "2 gateways")
        for number, policy in enumerate(("kv_aware", "lmetric"))
    ]
    files = charts(cells, tmp_path / "plots")
    assert [file.name for file in files] == ["policies.png", "cells.png"]
    assert all(1_000 < file.stat().st_size < 100_000 for file in files)


def test_every_policy_that_is_compared_exists_and_the_bounds_come_last() -> None:
    assert set(matrix.COMPARED) <= set(POLICIES)
    assert tuple(matrix.COMPARED[-2:]) == BOUNDS
    assert "kv_aware" in OURS


def test_results_are_kept_and_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    rows = [
        {
            "timestamp": 100 * n,
            "input_length": 640 + n,
            "output_length": 5,
            "hash_ids": [n % 3, 10 + n % 3, *range(50, 58)],
        }
        for n in range(12)
    ]
    (traces / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (traces / "unknown.jsonl").write_text('{"x": 1}\n')
    args = [
        "--traces",
        str(traces),
        "--results",
        str(tmp_path / "kept"),
        "--page",
        str(tmp_path / "page.md"),
        "--jobs",
        "1",
    ]
    monkeypatch.setattr(evaluate, "GENERATED", ())
    assert evaluate.main(args) == 0
    first = (tmp_path / "page.md").read_text()
    kept = sorted((tmp_path / "kept").iterdir())
    assert len(kept) == len(CONDITIONS)
    assert "### own" in first
    stamps = [file.stat().st_mtime_ns for file in kept]
    assert evaluate.main(args) == 0
    assert [file.stat().st_mtime_ns for file in kept] == stamps
