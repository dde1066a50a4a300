"""Finds and downloads the newest release of an engine, from the package index that uv is configured with."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tomllib
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from watch.sources import CannotRead

PYTHON, PLATFORM = "3.12", "x86_64-manylinux_2_40"
"""What a wheel must be built for: engines publish wheels for these in any case."""
INDEX_SECONDS, DOWNLOAD_SECONDS = 120.0, 60.0
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Release:
    """A release, and the smallest of its files that has the sources."""

    package: str
    version: str
    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.url.split("#")[0].rsplit("/", 1)[-1]


def find(package: str, *, uv: Path, version: str | None = None) -> Release:
    """A release; without a version the newest one that is no preview. Raises `CannotRead`."""
    wanted = package if version is None else f"{package}=={version}"
    command = [uv, "pip", "compile", "--quiet", "--no-deps", "--format", "pylock.toml"]
    command += ["--python-version", PYTHON, "--python-platform", PLATFORM, "-"]
    try:
        done = subprocess.run(  # noqa: S603 - the arguments are constants
            list(map(str, command)), input=wanted, capture_output=True, text=True, timeout=INDEX_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise CannotRead(f"the package index was asked for {wanted} and did not answer: {said}") from error
    return parse_lock(package, done.stdout)


def parse_lock(package: str, lock: str) -> Release:
    """The release in a lock file of one package. Raises `CannotRead`."""
    try:
        (found,) = (each for each in tomllib.loads(lock)["packages"] if each["name"] == package)
        files: list[dict[str, Any]] = [*found.get("wheels", ()), *([found["sdist"]] if "sdist" in found else ())]
        smallest = min(files, key=lambda file: file["size"])
        return Release(
            package=package,
            version=found["version"],
            url=smallest["url"],
            size=smallest["size"],
            sha256=smallest["hashes"]["sha256"],
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise CannotRead(
            f"uv's lock file of {package} names no file with a size and a SHA-256 ({error!r}). Look at it with "
            "`uv pip compile --no-deps --format pylock.toml -`, and mend watch/releases.py"
        ) from error


def fetch(release: Release, folder: Path) -> Path:
    """The release's file in `folder`, downloaded unless it is there. Raises `CannotRead`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / release.name
    if file.exists() and file.stat().st_size == release.size:
        return file
    print(f"Downloading {release.name} ({release.size / 1e6:,.0f} MB) into {folder} ...", flush=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(release.url, timeout=DOWNLOAD_SECONDS) as answer, partial.open("wb") as out:  # noqa: S310
            shutil.copyfileobj(answer, out, _CHUNK)
        if _sha256(partial) != release.sha256:
            raise CannotRead(f"{release.name} arrived with another SHA-256 than the index says. Run it again")
        partial.replace(file)
    except OSError as error:
        raise CannotRead(f"{release.name} cannot be downloaded: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
