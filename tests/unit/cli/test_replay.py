"""`matrixinfer replay`, from its arguments to its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.cli import main
from matrixinfer.study import plots

SMALL = "multi-round:sessions=6,turns=3,interval=0.5,think=2"


def replayed(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert main(["replay", *args, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_has_the_trace_the_settings_and_the_results_of_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = replayed(capsys, SMALL, "--pods", "2", "--kv-tokens-per-pod", "20000", "--policies", "random,kv_aware")
    assert list(line) == ["trace", "settings", "results"]
    assert line["trace"] == SMALL
    assert line["settings"]["pods"] == 2
    assert list(line["results"]) == ["random", "kv_aware"]
    times = ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_s")
    for results in line["results"].values():
        assert {"hit_rate", "imbalance", *times} <= set(results)
        assert all(results[time] > 0 for time in times)
        rungs = results["ladder"]["rungs"]
        assert [rung["name"] for rung in rungs] == ["ideal", "capacity", "perfect", "predicted", "reported"]
        assert rungs[-1]["share"] == results["hit_rate"]
    assert line["results"]["kv_aware"]["hit_rate"] > line["results"]["random"]["hit_rate"]


def test_equal_arguments_give_equal_output(capsys: pytest.CaptureFixture[str]) -> None:
    args = (SMALL, "--policies", "power_of_two", "--gateways", "2", "--fault", "restart@2:1:3", "--event-loss", "0.1")
    assert replayed(capsys, *args, "--seed", "3") == replayed(capsys, *args, "--seed", "3")
    assert replayed(capsys, *args, "--seed", "3") != replayed(capsys, *args, "--seed", "4")


def test_the_seed_of_hashes_changes_nothing() -> None:
    args = [sys.executable, "-m", "matrixinfer", "replay", SMALL, "--json", "--gateways", "2", "--gossip"]
    args += ["--policies", "kv_aware,lmetric,approx_prefix,clairvoyant", "--fault", "restart@2:1:3"]
    shown = [
        subprocess.run(args, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert shown[0] == shown[1]


def test_several_traces_are_several_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 1600, "output_length": 20, "hash_ids": [1, 2, 3, 4]}
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row | {"timestamp": 60_000 * number}) + "\n" for number in range(3)))
    first, second = replayed(capsys, SMALL, str(file), "--policies", "kv_aware", "--pods", "2")
    assert (first["trace"], second["trace"]) == (SMALL, "own")
    assert second["results"]["kv_aware"]["hit_rate"] == pytest.approx(2 * 1536 / 4800, abs=1e-4)


def test_conversations_are_tokenized_for_real(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "You are a patient teacher of geography. " * 20},
        {"role": "user", "content": "Which rivers cross Vienna?"},
        {"role": "assistant", "content": "The Danube, and some smaller ones."},
        {"role": "user", "content": "And Paris?"},
        {"role": "assistant", "content": "The Seine."},
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    (line,) = replayed(capsys, str(file), "--policies", "kv_aware", "--pods", "2")
    assert line["settings"]["requests"] == 2
    assert line["results"]["kv_aware"]["hit_rate"] > 0.4


def test_the_table_names_policies_and_columns_and_plots_are_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["replay", SMALL, "--policies", "random,kv_aware", "--pods", "2", "--plot", str(tmp_path)]
    args += ["--report", str(tmp_path / "report.html")]
    assert main(args) == 0
    shown = capsys.readouterr().out
    for word in (
        "capacity",
        "predicted",
        "largest losses",
        "hit_rate",
        "ttft_p90_s",
        "random",
        "kv_aware",
        "ideal hit rate",
    ):
        assert word in shown
    written = sorted(path.name for path in tmp_path.glob("*/*.png"))
    assert written == ["hits.png", "ladder.png", "load.png", "ttft.png"]
    assert "kv_aware" in (tmp_path / "report.html").read_text()
    assert all(path.stat().st_size > 5_000 for path in tmp_path.glob("*/*.png"))


def test_plots_that_cannot_be_drawn_are_refused_before_the_replay(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    assert main(["replay", SMALL, "--plot", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--plot: matplotlib is not installed" in err


def test_the_list_names_policies_engines_and_generators(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--list"]) == 0
    shown = capsys.readouterr().out
    for word in ("session_sticky", "clairvoyant", "arXiv:2603.15202", "llama-70b-4xh100", "agent-loop"):
        assert word in shown


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "expected a file"),
        ([SMALL, "--policies", "psychic"], "unknown policy `psychic`"),
        ([SMALL, "--engine", "abacus"], "unknown engine `abacus`"),
        ([SMALL, "--fault", "restart@3:9"], "there is no pod 9"),
        ([SMALL, "--fault", "melt@3"], "one of restart"),
        ([SMALL, "--report", "/no/such/folder/r.html"], "there is no folder /no/such/folder"),
        ([SMALL, "--kv-tokens-per-pod", "3"], "at least one block of 16"),
    ],
)
def test_wrong_arguments_are_explained(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *args]) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_format_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"when": 1, "what": 2}\n')
    assert main(["replay", str(file)]) == 2
    assert "found `what`, `when`" in capsys.readouterr().err


def test_an_access_log_shows_what_was_recorded_beside_the_replay(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = {"at": 1.0, "id": "r", "path": "/v1/x", "outcome": "answered", "status": 200, "model": "m", "block_size": 16}
    line |= {"prompt_tokens": 40, "output_tokens": 5, "cached_tokens": 16, "stream_events": 6, "blocks": [7, 8]}
    line |= {"ms": {"first_byte": 250.0, "total": 500.0}}
    file = tmp_path / "access.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert main(["replay", str(file), "--policies", "kv_aware", "--pods", "1"]) == 0
    assert "as recorded: hit_rate 0.4, ttft_mean_s 0.25, ttft_p90_s 0.25" in capsys.readouterr().out
