import errno
import gzip
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.feedtools.capture_file import CaptureFileError, CaptureReader, CaptureWriter

ROWS: list[dict[str, Any]] = [{"kind": "meta"}, {"kind": "event", "seq": 1, "payload_hex": "c1" * 500}, {"kind": "é"}]
NAMES = pytest.mark.parametrize("name", ["capture.jsonl", "capture.jsonl.gz"])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with CaptureWriter(path) as capture:
        for row in rows:
            capture.write(row)


@NAMES
def test_what_was_written_is_read_any_number_of_times(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    reader = CaptureReader(tmp_path / name)
    assert list(reader) == list(reader) == ROWS
    assert not reader.cut
    assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")


@pytest.mark.parametrize("earlier", [None, 0o644])
def test_only_the_owner_may_read_a_recording(tmp_path: Path, earlier: int | None) -> None:
    file = tmp_path / "capture"
    if earlier is not None:
        file.touch()
        file.chmod(earlier)
    with CaptureWriter(file):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_recording_into_a_device_leaves_it_to_everyone() -> None:
    mode = Path("/dev/null").stat().st_mode
    write(Path("/dev/null"), ROWS)
    assert Path("/dev/null").stat().st_mode == mode


def test_a_file_that_cannot_be_kept_from_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def refuse(descriptor: int, _: int) -> None:
        opened.append(descriptor)
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(CaptureFileError, match="not yours"), CaptureWriter(tmp_path / "capture"):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_the_size_is_that_of_the_rows(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path / "capture.gz") as capture:
        capture.write({"a": 1})
        assert capture.size == len(b'{"a":1}\n')


@NAMES
def test_what_was_flushed_is_there_before_the_file_is_closed(tmp_path: Path, name: str) -> None:
    with CaptureWriter(tmp_path / name) as capture:
        capture.write(ROWS[0])
        capture.flush()
        capture.write(ROWS[1])
        reader = CaptureReader(tmp_path / name)
        assert list(reader) == ROWS[:1]
        assert reader.cut == name.endswith(".gz")


@NAMES
def test_a_file_that_is_cut_anywhere_gives_its_whole_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / "whole", ROWS)
    plain = (tmp_path / "whole").read_bytes()
    data = gzip.compress(plain, mtime=0) if name.endswith(".gz") else plain
    for length in range(2, len(data)):
        (tmp_path / name).write_bytes(data[:length])
        reader = CaptureReader(tmp_path / name)
        rows = list(reader)
        assert rows == ROWS[: len(rows)]
        if name.endswith(".gz"):
            assert reader.cut
        else:
            assert len(rows) + reader.cut >= plain[:length].count(b"\n")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing", None, "No such file"),
        ("text", b"no json\n{}\n", "line 1"),
        ("list", b'{"kind": "meta"}\n[1]\n', "line 2: expected a JSON object"),
        ("deep", b"[" * 100_000 + b"\n", "line 1"),
        ("plain.gz", b'{"kind": "meta"}\n', "gzip"),
        ("broken.gz", gzip.compress(b"x" * 100, mtime=0)[:10] + b"\xff" * 20, "invalid"),
    ],
)
def test_what_is_no_capture_is_refused(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CaptureFileError, match=reason):
        list(CaptureReader(tmp_path / name))


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureFileError, match="No such file"), CaptureWriter(tmp_path / "missing" / "file"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("row", [{}, {"more": "x" * 20_000}])
def test_a_full_disk_is_reported(row: dict[str, Any]) -> None:
    with pytest.raises(CaptureFileError, match="No space"), CaptureWriter(Path("/dev/full")) as capture:
        capture.write(row)


def test_rows_are_one_line_each(tmp_path: Path) -> None:
    write(tmp_path / "capture", [{"a": "x\ny"}, {}])
    assert [json.loads(line) for line in (tmp_path / "capture").read_text().splitlines()] == [{"a": "x\ny"}, {}]
