"""Finding a release, downloading it and reading its files."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from watch.releases import Release, fetch, find, parse_lock
from watch.sources import CannotRead, opened

LOCK = """
[[packages]]
name = "made"
version = "1.2"
sdist = { url = "https://index.invalid/made-1.2.tar.gz", size = 10, hashes = { sha256 = "aa" } }
wheels = [{ url = "https://index.invalid/made-1.2-py3-none-any.whl", size = 20, hashes = { sha256 = "bb" } }]
"""


def wheel(file: Path, **files: str) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"made/{name}.py", text)
    return file


def distribution(file: Path, **files: str) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"made-1.2/made/{name}.py")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return file


def test_the_smallest_file_of_a_release_is_taken() -> None:
    assert parse_lock("made", LOCK) == Release(
        package="made", version="1.2", url="https://index.invalid/made-1.2.tar.gz", size=10, sha256="aa"
    )


@pytest.mark.parametrize("lock", ["", "[", LOCK.replace("made", "other"), LOCK.replace("size = 10", "length = 10")])
def test_a_lock_file_that_names_no_file_says_where_to_look(lock: str) -> None:
    with pytest.raises(CannotRead, match=r"names no file .* mend watch/releases.py"):
        parse_lock("made", lock)


def test_an_index_that_does_not_answer_is_quoted() -> None:
    with pytest.raises(CannotRead, match=r"asked for made and did not answer: .*No such file"):
        find("made", uv=Path("/nonexistent/uv"))


@pytest.mark.parametrize("make", [wheel, distribution])
def test_files_are_read_from_either_form_of_a_release(tmp_path: Path, make: type) -> None:
    archive = make(tmp_path / ("made.whl" if make is wheel else "made-1.2.tar.gz"), events="x = 'é'")
    with opened(archive) as sources:
        assert (sources.text("made/events.py"), sources.text("made/none.py")) == ("x = 'é'", None)


@pytest.mark.parametrize("name", ["made.whl", "made-1.2.tar.gz"])
@pytest.mark.parametrize("content", [b"", b"not an archive"])
def test_an_unreadable_archive_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with (
        pytest.raises(CannotRead, match=rf"{name} cannot be read: .*\. Delete .* so that the next run"),
        opened(tmp_path / name),
    ):
        pass


def release(file: Path) -> Release:
    content = file.read_bytes()
    return Release(
        package="made", version="1", url=file.as_uri(), size=len(content), sha256=hashlib.sha256(content).hexdigest()
    )


def test_a_release_is_downloaded_once(tmp_path: Path) -> None:
    origin = wheel(tmp_path / "made.whl", events="x = 1")
    wanted = release(origin)
    kept = fetch(wanted, tmp_path / "kept")
    assert kept.read_bytes() == origin.read_bytes()
    origin.unlink()
    assert fetch(wanted, tmp_path / "kept") == kept


def test_a_download_with_another_content_is_not_kept(tmp_path: Path) -> None:
    wanted = release(wheel(tmp_path / "made.whl", events="x = 1"))
    (tmp_path / "made.whl").write_bytes(b"something else")
    with pytest.raises(CannotRead, match="another SHA-256"):
        fetch(wanted, tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


def test_a_download_that_fails_says_so(tmp_path: Path) -> None:
    gone = Release(package="made", version="1", url=(tmp_path / "made.whl").as_uri(), size=1, sha256="")
    with pytest.raises(CannotRead, match=r"made\.whl cannot be downloaded"):
        fetch(gone, tmp_path / "kept")


def test_the_watch_finds_uv_beside_its_python() -> None:
    assert Path(sys.executable).with_name("uv").exists()
