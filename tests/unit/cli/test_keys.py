from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from matrixinfer.access.key_file import hash_of, parse_keys
from matrixinfer.cli import main
from matrixinfer.config.access import QuotaConfig


def test_a_new_key_and_its_entry_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "--name", "alice: [x", "--tenant", "lab"]) == 0
    shown = capsys.readouterr()
    key = shown.err.strip()
    assert key not in shown.out
    caller = parse_keys(f"keys:\n{shown.out}", QuotaConfig()).find(key, 0.0)
    assert caller is not None
    assert (caller.name, caller.tenant) == ("alice: [x", "lab")


@pytest.mark.parametrize("start", ["", "keys:\n"])
def test_entries_that_are_appended_make_a_file_of_keys(capsys: pytest.CaptureFixture[str], start: str) -> None:
    for name in ("alice", "bob"):
        assert main(["keys", "create", "--name", name]) == 0
    assert parse_keys(start + capsys.readouterr().out, QuotaConfig()).names == {"alice", "bob"}


def test_a_new_key_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "--name", "bob", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["entry"] == {"name": "bob", "hash": hash_of(made["key"])}


def test_the_hash_of_a_key_that_exists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("sk-1\n"))
    assert main(["keys", "hash"]) == 0
    assert capsys.readouterr().out == hash_of("sk-1") + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("two words"))
    assert main(["keys", "hash"]) == 2


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ("pods: [{name: a, url: 'http://a', apiKeyFile: none.key}]", "$.pods[0].apiKeyFile"),
        ("engineKeys: {apiKeyEnv: NO_SUCH_KEY}", "$.engineKeys.apiKeyEnv"),
        ("access: {keysFile: none.yaml}", "$.access.keysFile"),
        ("access: {keysFile: keys.yaml}", "$.access.keysFile"),
        ("access: {}", "$.access"),
        ("access: {jwt: {issuer: i, audience: [a]}}", "$.access.jwt"),
        ("access: {jwt: {issuer: i, audience: [a], jwksUrl: 'ftp://x'}}", "$.access.jwt.jwksUrl"),
        ("access: {jwt: {issuer: i, audience: [], jwksFile: x}}", "$.access.jwt.audience"),
        ("access: {jwt: {issuer: i, audience: [a], jwksFile: x, algorithms: [HS256]}}", "$.access.jwt.algorithms[0]"),
        ("access: {keysFile: good.yaml, isolation: {}}", "$.access.isolation"),
        ("access: {keysFile: good.yaml, isolation: {secretFile: good.yaml}}", "$.access.isolation.secretFile"),
        ("access: {keysFile: good.yaml, tenants: [{name: a}, {name: a}]}", "$.access.tenants[1].name"),
        ("access: {keysFile: good.yaml, limits: {request: 1}}", "$.access.limits.request"),
        ("admission: {}", "$.admission"),
        ("admission: {maxConcurrentRequests: 0}", "$.admission.maxConcurrentRequests"),
    ],
)
def test_config_check_finds_what_a_start_would_find(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, path: str
) -> None:
    (tmp_path / "keys.yaml").write_text("keys: [{name: a}]")
    (tmp_path / "good.yaml").write_text("keys: []")
    file = tmp_path / "config.yaml"
    file.write_text(config)
    assert main(["config", "check", str(file)]) == 2
    assert f"{path}: " in capsys.readouterr().err
