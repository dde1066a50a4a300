from __future__ import annotations

from pathlib import Path

import pytest

from matrixinfer.prompt.found import Places, hub_cache, places

REPO = "org/model"


def revision(cache: Path, name: str, *, main: str | None = None, repo: str = REPO) -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "snapshots" / name).mkdir(parents=True)
    if main is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(main)
    return folder / "snapshots" / name


def paths(found: Places) -> list[Path]:
    return [place.path for place in found.places]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"HF_HUB_CACHE": "", "XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, str(Path("~/.cache/huggingface/hub").expanduser())),
    ],
)
def test_the_cache_is_where_the_library_has_it(environment: dict[str, str], expected: str) -> None:
    assert str(hub_cache(environment)) == expected


def test_a_path_of_the_engine_that_is_here_is_the_only_place(tmp_path: Path) -> None:
    assert paths(places(str(tmp_path), tmp_path / "hub")) == [tmp_path]


def test_a_path_of_the_engine_that_is_not_here_says_so(tmp_path: Path) -> None:
    found = places("/srv/models/river", tmp_path)
    assert (found.places, found.missing) == ((), "the engine's path /srv/models/river is not on this machine")
    assert found.repo is None


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert paths(places(str(tmp_path / "model.gguf"), tmp_path)) == []


def test_a_snapshot_in_the_engines_cache_is_looked_up_here_by_its_revision(tmp_path: Path) -> None:
    revision(tmp_path, "aaa", main="aaa")
    exact = revision(tmp_path, "bbb")
    root = "/root/.cache/huggingface/hub/models--org--model/snapshots/bbb"
    assert paths(places(root, tmp_path)) == [exact]
    missing = places(root.replace("bbb", "ccc"), tmp_path)
    assert paths(missing) == []
    assert (missing.repo, missing.revision) == (REPO, "ccc")


def test_the_main_revision_is_what_an_engine_loads(tmp_path: Path) -> None:
    revision(tmp_path, "aaa")
    main = revision(tmp_path, "bbb", main="bbb")
    assert paths(places(REPO, tmp_path)) == [main]


def test_the_only_revision_will_do_without_main(tmp_path: Path) -> None:
    only = revision(tmp_path, "aaa", main="gone")
    assert paths(places(REPO, tmp_path)) == [only]


def test_several_revisions_without_main_are_not_guessed_from(tmp_path: Path) -> None:
    revision(tmp_path, "aaa")
    revision(tmp_path, "bbb")
    found = places(REPO, tmp_path)
    assert paths(found) == []
    assert found.missing == f"{tmp_path} has several revisions of {REPO} and none is main: aaa, bbb"


def test_another_repository_of_the_same_name_is_not_taken(tmp_path: Path) -> None:
    revision(tmp_path, "aaa", main="aaa", repo="other/model")
    for root in (REPO, "model"):
        found = places(root, tmp_path)
        assert (paths(found), found.missing) == ([], f"{root} is not in {tmp_path}")


@pytest.mark.parametrize(
    "root", ["", ".", "..", "../x", "./model", "a/b/c", "org/..", "-model", "a b", "org/", "/"[:0]]
)
def test_what_names_no_repository_is_not_looked_up(root: str, tmp_path: Path) -> None:
    found = places(root, tmp_path)
    assert (paths(found), found.repo) == ([], None)


def test_a_name_without_owner_is_looked_up_but_never_downloaded(tmp_path: Path) -> None:
    path = revision(tmp_path, "aaa", main="aaa", repo="gpt2")
    assert paths(places("gpt2", tmp_path)) == [path]
    assert places("gpt3", tmp_path).repo is None


@pytest.mark.parametrize("main", ["", "..", "a/b", "\x00"])
def test_a_broken_reference_leads_nowhere(main: str, tmp_path: Path) -> None:
    only = revision(tmp_path, "aaa", main=main)
    assert paths(places(REPO, tmp_path)) == [only]
