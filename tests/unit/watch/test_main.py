"""The command: what it prints, returns and writes."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
from watch import __main__ as command
from watch import report
from watch.releases import Release

from tests.unit.watch.support import ENGINE, EVENTS, KINDS, METRICS


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page; the made-up engine is the only one that is watched."""
    monkeypatch.setattr(command, "ENGINES", (ENGINE,))
    monkeypatch.setattr(report, "ENGINES", (ENGINE,))
    file = tmp_path / "page.md"
    file.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    monkeypatch.setattr(sys, "argv", ["watch", str(tmp_path / "kept"), "--page", str(file)])
    return file


def release(folder: Path, monkeypatch: pytest.MonkeyPatch, events: str) -> None:
    """Make a release with these events the newest."""
    wheel = folder / "made-3.0.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (("events", events), ("kinds", KINDS), ("metrics", METRICS)):
            archive.writestr(f"made/{name}.py", text)
    content = wheel.read_bytes()
    found = Release(
        package="made",
        version="3.0",
        url=wheel.as_uri(),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setattr(command, "find", lambda package, uv: found)


def test_a_known_release_is_written_to_the_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release(tmp_path, monkeypatch, EVENTS)
    assert command.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Made 3.0: no differences"
    assert "| Made | 3.0 | 20" in page.read_text()


def test_a_release_with_differences_is_printed_and_leaves_the_page_alone(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release(tmp_path, monkeypatch, EVENTS.replace("    session_id", "    tenant: str | None = None\n    session_id"))
    assert command.main() == 1
    *_, summary, sentence = capsys.readouterr().out.splitlines()
    assert summary == "Made 3.0: 1 difference"
    assert sentence.startswith("- Made: BlockStored has a new field `tenant`.")
    assert page.read_text() == f"{report.BEGIN}\nold\n{report.END}\n"


def test_a_release_that_cannot_be_had_is_a_failure(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Release(package="made", version="3.0", url=page.with_name("none.whl").as_uri(), size=1, sha256="")
    monkeypatch.setattr(command, "find", lambda package, uv: gone)
    assert command.main() == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("- Made: none.whl cannot be downloaded: ")
