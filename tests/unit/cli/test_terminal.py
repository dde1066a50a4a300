"""Names from anywhere are printed as they are, and cannot format the output, move the cursor or add lines."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.cli import agent, explain, main
from matrixinfer.cli.terminal import Rows, Terminal, own_name, plain
from matrixinfer.errors import ConfigError

HOSTILE = (
    "[/foo]bar",
    "g[l]o*",
    "[bold]x[/bold]",
    ":smile:",
    "a\nb",
    "a\rb",
    "\x1b[31mred\x1b[0m",
    "\x07",
    "\u202eabc",
    "\ud800",
)


@given(st.text(st.characters()))
def test_escaped_text_is_one_printable_line(text: str) -> None:
    assert plain(text).isprintable()
    assert plain(plain(text)) == plain(text)
    if text.isprintable():
        assert plain(text) == text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    rows = Rows("pod", name)
    rows.add_row(name, "1")
    terminal.print(f"{name}: 1 block")
    terminal.print(rows)
    line, header, row = capsys.readouterr().out.splitlines()
    assert line == f"{plain(name)}: 1 block"
    assert header.split(maxsplit=1)[1].strip() == plain(name)
    assert row.strip().startswith(plain(name))


def candidate_view(scorer: str = "s", **fields: Any) -> dict[str, Any]:
    """A pod in a decision, as the admin listener reports it."""
    return {
        "trust": "exact",
        "matched_blocks": 1,
        "pending_blocks": 0,
        "recent_blocks": 0,
        "recent_chunks": 0,
        "reuse": 1.0,
        "credit": 1.0,
        "in_flight": 0,
        "waiting": None,
        "scores": {scorer: 1.0},
        "total": 1.0,
        "filtered": None,
        "tiers": [],
        **fields,
    }


def decision_view(name: str, pods: dict[str, Any]) -> dict[str, Any]:
    """A decision, as the admin listener reports it."""
    return {
        "id": name,
        "at": 0.0,
        "path": "/v1",
        "model": name,
        "tokens": 1,
        "blocks": 1,
        "chosen": name,
        "candidates": len(pods),
        "predicted_hit_tokens": 1,
        "guessed_hit_tokens": 0,
        "unknown_tokens": 0,
        "other_tokens": 0,
        "chunks": 0,
        "pods": pods,
        "notes": [name],
        "reported": {"attempts": [name], "status": 200, "cached_tokens": 1, "prompt_tokens": 2},
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_explain_prints_ids_pods_and_models_as_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decision = decision_view(name, {name: candidate_view(scorer=name)})

    async def answer(_: object) -> dict[str, Any]:
        return {"decisions": [decision]}

    monkeypatch.setattr(explain, "_ask", answer)
    for arguments, lines in ((["explain"], 2), (["explain", "x"], 7)):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert out.count(plain(name)) >= 3
        assert len(out.splitlines()) == lines
        assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.parametrize(("sent_ids", "shown"), [(True, "sent to a with token ids; "), (False, "sent to a; ")])
def test_explain_says_whether_token_ids_were_sent(
    sent_ids: bool, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decision = decision_view("a", {"a": candidate_view()})
    decision["reported"]["sent_ids"] = sent_ids

    async def answer(_: object) -> dict[str, Any]:
        return {"decisions": [decision]}

    monkeypatch.setattr(explain, "_ask", answer)
    assert main(["explain", "a"]) == 0
    assert f"{shown}answered 200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "tokens", "shown"),
    [
        ({"matched_blocks": None}, 300, "-"),
        ({}, None, "-"),
        ({"matched_blocks": None, "recent_blocks": 1}, 300, "0"),
        ({"matched_blocks": 0}, 300, "0"),
    ],
)
def test_explain_shows_no_prediction_where_nothing_was_predicted(
    fields: dict[str, Any],
    tokens: int | None,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decision = decision_view("a", {"a": candidate_view(**fields)}) | {"tokens": tokens, "predicted_hit_tokens": 0}

    async def answer(_: object) -> dict[str, Any]:
        return {"decisions": [decision]}

    monkeypatch.setattr(explain, "_ask", answer)
    assert main(["explain"]) == 0
    heads, row = capsys.readouterr().out.splitlines()
    assert row[heads.index("predicted_hit_tokens") :].split()[0] == shown
    assert main(["explain", "x"]) == 0
    words = "unknown" if shown == "-" else "0 tokens"
    assert f"predicted hit: {words} on a" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["[/foo]", "[red]x"])
def test_the_doctor_prints_pods_as_they_are(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f'pods: [{{name: "{name}", url: "http://127.0.0.1:1"}}]')
    assert main(["doctor", "--config", str(file), "--patience", "1"]) == 2
    assert capsys.readouterr().out.splitlines()[0] == f"{name}  http://127.0.0.1:1"


def test_pods_may_be_named_with_the_clusters_domain(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text('pods: [{name: a.ns, url: "http://h:1"}, {name: b.ns.svc.cluster.local, url: "http://h:2"}]')

    def followed(*pods: str) -> list[str]:
        arguments = argparse.Namespace(config=file, pod=list(pods))
        return [pod.name for pod in agent.configuration(arguments).pods]

    assert followed("a.ns.svc.cluster.local") == followed("a.ns") == ["a.ns"]
    assert followed("b.ns") == followed("b.ns.svc.cluster.local") == ["b.ns"]
    with pytest.raises(ConfigError, match="expected a pod of the config file"):
        followed("c.ns.svc.cluster.local")


def test_explain_finds_pods_by_the_name_with_the_clusters_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Session:
        def __init__(self, *_: object, **__: object) -> None: ...

        async def __aenter__(self) -> Session:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        def get(self, _: str, *, params: dict[str, str]) -> None:
            asked.append(params)
            raise OSError

    monkeypatch.setattr("aiohttp.ClientSession", Session)
    arguments = argparse.Namespace(admin="h:1", body=None, id=None, last=1, pod="a.ns.svc.cluster.local", ladder=False)
    with pytest.raises(explain.CannotExplain):
        asyncio.run(explain._ask(arguments))  # noqa: SLF001 - the request that it makes
    assert asked == [{"limit": "1", "pod": "a.ns"}]


def test_explain_shows_what_a_decision_used_where_anything_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {
        "running": 4,
        "foreign": 3,
        "metrics_age_s": 0.25,
        "queue_ms": 456.8,
        "held_tokens": 90_000,
        "cache_tokens": 100_000,
        "evicted_tokens_per_second": 0.0,
        "expected_ms": 512.3,
    }
    pods = {name: candidate_view(**fields) for name, fields in (("a", known), ("b", dict.fromkeys(known)))}

    async def answer(_: object) -> dict[str, Any]:
        return {"decisions": [decision_view("a", pods)]}

    monkeypatch.setattr(explain, "_ask", answer)
    assert main(["explain", "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, first, second = (line.split() for line in lines[-4:-1])
    shown = [name for name in known if name != "evicted_tokens_per_second"]
    assert head[head.index("waiting") + 1 :][: len(shown)] == shown
    at = head.index("running")
    assert first[at : at + len(shown)] == ["4", "3", "0.2", "456.8", "90000", "100000", "512.3"]
    assert second[at : at + len(shown)] == ["-"] * len(shown)


def test_hints_name_the_command_as_it_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [".venv/bin/matrixinfer", "demo"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_name() == ".venv/bin/matrixinfer"
    (tmp_path / "matrixinfer").touch(mode=0o755)
    assert own_name() == "matrixinfer"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["/src/matrixinfer/__main__.py"])
    assert own_name() == "matrixinfer"
