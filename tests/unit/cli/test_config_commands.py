"""`config show`, `config schema`, `config check` of files that list pods, and `completion`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from matrixinfer.cli import COMMANDS, main


def test_show_prints_what_is_in_effect_without_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("redis: {password: hush}\npods: [{name: a, url: 'http://a:1/'}]")
    assert main(["config", "show", str(file)]) == 0
    out = capsys.readouterr().out
    assert "hush" not in out
    (pod,) = yaml.safe_load(out)["pods"]
    assert (pod["name"], pod["url"], pod["kvEvents"]) == ("a", "http://a:1", "discover")
    assert main(["config", "show", "--json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["redis"]["password"] == "(hidden)"


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$defs"]["Config"]["additionalProperties"] is False


def test_check_reads_the_files_that_list_pods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, pods = tmp_path / "gateway.yaml", tmp_path / "pods.yaml"
    file.write_text("discovery: {files: [{path: pods.yaml}]}")
    assert main(["config", "check", str(file)]) == 0
    assert "pods.yaml does not exist yet" in capsys.readouterr().err
    pods.write_text("- {name: a}")
    assert main(["config", "check", str(file)]) == 2
    assert "$.pods[0]: missing the required key `url`" in capsys.readouterr().err
    pods.write_text("- {name: a, url: 'http://a:1'}")
    assert main(["config", "check", str(file)]) == 0


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_bash_completes_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = (
        f"source {tmp_path / 'script'}; COMP_WORDS=(matrixinfer {{}}); COMP_CWORD={{}}; COMP_TYPE=9;"
        "_shtab_matrixinfer matrixinfer; echo ${{COMPREPLY[@]}}"
    )

    def completed(words: str, position: int) -> str:
        return subprocess.run(
            ["bash", "-c", ask.format(words, position)], check=True, capture_output=True, text=True
        ).stdout

    assert "serve" in completed("s", 1).split()
    assert "show" in completed("config s", 2).split()
    assert "--config" in completed("serve --c", 2).split()
