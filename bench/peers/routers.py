"""The routers that are compared: where they come from, and how they are started."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import uvloop
from tests.ports import free_port

from bench.measure import cpu_seconds
from bench.prompts import MODEL, tokenizer_path
from matrixinfer.prompt.openai import CHAT_PATH

OURS = "ours"
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another router, as its package installs it."""

    package: str
    version: str
    command: Sequence[str]
    """What follows the package's `python`, before the arguments that all take."""

    def python(self, folder: Path) -> Path:
        """The interpreter of its own environment: packages of the same origin replace each other's modules."""
        return folder / f"{self.package}-{self.version}" / "bin" / "python"

    def install(self, folder: Path) -> None:
        """Install it from the package index, unless it is there. Raises `subprocess.CalledProcessError`."""
        home = self.python(folder).parents[1]
        done = home / ".installed"
        if done.exists():
            return
        print(f"Installing {self.package} {self.version} into {home} ...", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        pip = [str(self.python(folder)), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        subprocess.run([*pip, f"{self.package}=={self.version}"], check=True)
        done.touch()

    def arguments(self, folder: Path, port: int, engines: Sequence[str]) -> list[str]:
        """The command that starts it in front of `engines`, with its policy for prefix caches."""
        return [
            *(str(self.python(folder)), *self.command),
            *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", *engines),
            *("--policy", "cache_aware", "--log-level", "error", "--worker-startup-check-interval", "1"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        ]


PEERS: Sequence[Peer] = (
    Peer(package="vllm-router", version="0.1.17", command=("-m", "vllm_router.launch_router")),
    Peer(package="sglang-router", version="0.3.2", command=("-m", "sglang_router.launch_router")),
    Peer(package="smg", version="1.13.0", command=("-m", "smg.cli", "launch")),
)


def gateway(folder: Path, port: int, engines: Sequence[str]) -> list[str]:
    """The command that starts the gateway, with a local tokenizer: it knows the token ids that the others guess at."""
    config = {
        "listen": f"127.0.0.1:{port}",
        "admin": None,
        "models": [{"name": MODEL, "tokenizer": str(tokenizer_path()), "chatTemplate": "chatml"}],
        "pods": [{"name": f"pod-{i}", "url": url, "kvEvents": "none"} for i, url in enumerate(engines)],
        "log": {"level": "warning"},
    }
    file = folder / f"gateway-{port}.yaml"
    file.write_bytes(msgspec.yaml.encode(config))
    return [sys.executable, "-m", "matrixinfer", "serve", "--config", str(file)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A running router."""

    name: str
    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of its process and of all that it has started."""
        return sum(map(cpu_seconds, self.family()))

    def family(self) -> Sequence[int]:
        """Its process and all that it has started."""
        return _family(self.pid)


@contextmanager
def running(
    name: str,
    folder: Path,
    engines: Sequence[str],
    command: Callable[[Path, int, Sequence[str]], list[str]],
    *,
    model: str = MODEL,
) -> Iterator[Router]:
    """A router in front of `engines` until the context ends. Raises `RuntimeError` when it does not start."""
    port = free_port()
    log = folder / f"{name}.log"
    with log.open("wb") as out, subprocess.Popen(command(folder, port, engines), stdout=out, stderr=out) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            if not uvloop.run(_answers(process, url, model)):
                raise RuntimeError(f"{name} did not answer within {_START_SECONDS:g} s: see {log}")
            yield Router(name=name, url=url, pid=process.pid)
        finally:
            _stop(process)


async def _answers(process: subprocess.Popen[bytes], url: str, model: str) -> bool:
    """Whether it answers a chat before its time is up."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    deadline = time.monotonic() + _START_SECONDS
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.post(url + CHAT_PATH, json=body) as answer:
                    if answer.status == 200:
                        return True
            await asyncio.sleep(0.2)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    for pid in reversed(_family(process.pid)[1:]):
        subprocess.run(["kill", str(pid)], check=False, capture_output=True)
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _family(pid: int) -> list[int]:
    """A process and its descendants, parents first (Linux)."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, task.read_text(encoding="ascii").split())
    return found
