"""Where the tokenizer files of a served model are on this machine: at the engine's own path, or in Hugging Face's cache.

Only what the engine reports (vLLM: `root` of `/v1/models`; SGLang: the paths of `/model_info`) is followed. No other model is ever guessed from a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")
_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/([0-9A-Za-z._-]+)/?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder that may hold a model's tokenizer."""

    path: Path
    origin: str
    """How it was found, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What was found for one root: the places to try in order, and why other places are not among them."""

    places: Sequence[Place] = ()
    missing: str | None = None
    """Why there is no place."""
    repo: str | None = None
    """The repository that could be downloaded, if the root names one."""
    revision: str | None = None
    """Its revision, if the root names that, too."""


def hub_cache(environment: Mapping[str, str]) -> Path:
    """The folder of Hugging Face's cache, by the same variables as `huggingface_hub` uses."""
    for name, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if environment.get(name):
            return Path(environment[name]).expanduser() / below
    return Path("~/.cache/huggingface/hub").expanduser()


def places(root: str, cache: Path) -> Places:
    """Find what `root` names: an absolute path here, a snapshot in a cache, or a repository in the cache."""
    named = _SNAPSHOT.search(root)
    if root.startswith("/"):
        if Path(root).is_dir():
            return Places(places=(Place(path=Path(root), origin="the engine's own path"),))
        if named is None:
            return Places(missing=f"the engine's path {root} is not on this machine")
        return _snapshot(cache, folder=named[1], revision=named[2])
    if not _REPO.fullmatch(root) or ".." in root:
        return Places(missing=f"{root} is neither an absolute path nor the name of a repository")
    return _repository(cache, root)


def changed_at(folder: Path) -> float:
    """When a file in the folder was last changed; 0 if it cannot be read."""
    try:
        return max((each.stat().st_mtime for each in folder.iterdir()), default=0.0)
    except OSError:
        return 0.0


def _snapshot(cache: Path, *, folder: str, revision: str) -> Places:
    """The revision that a path in another machine's cache names, in this machine's cache."""
    repo = folder.replace("--", "/", 1)
    path = cache / f"models--{folder}" / "snapshots" / revision
    if path.is_dir():
        return Places(places=(Place(path=path, origin=f"revision {revision} in {cache}"),))
    missing = f"revision {revision} of {repo} is not in {cache}"
    return Places(missing=missing, repo=repo if "/" in repo and _REPO.fullmatch(repo) else None, revision=revision)


def _repository(cache: Path, repo: str) -> Places:
    """The cached revision of a repository that an engine loads when none is named: `main`, or the only one."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    downloadable = repo if "/" in repo else None  # without an owner, a name may stand for a folder of the engine's
    main = _first_word(folder / "refs" / "main")
    if main is not None and (folder / "snapshots" / main).is_dir():
        place = Place(path=folder / "snapshots" / main, origin=f"revision {main} (main) in {cache}")
        return Places(places=(place,), repo=downloadable)
    try:
        snapshots = sorted(each for each in (folder / "snapshots").iterdir() if each.is_dir())
    except OSError:
        snapshots = []
    if len(snapshots) == 1:
        place = Place(path=snapshots[0], origin=f"revision {snapshots[0].name}, the only one in {cache}")
        return Places(places=(place,), repo=downloadable)
    if snapshots:
        revisions = ", ".join(each.name for each in snapshots[:4])
        return Places(
            missing=f"{cache} has several revisions of {repo} and none is main: {revisions}", repo=downloadable
        )
    return Places(missing=f"{repo} is not in {cache}", repo=downloadable)


def _first_word(file: Path) -> str | None:
    try:
        words = file.read_text(encoding="utf-8", errors="replace")[:200].split()
    except OSError:
        return None
    return words[0] if words and re.fullmatch(r"[0-9A-Za-z._-]+", words[0]) and words[0] not in (".", "..") else None
