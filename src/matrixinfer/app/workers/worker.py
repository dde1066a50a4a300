"""What a worker shares with its supervisor: its listening sockets and a folder."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
from aiohttp import web

from matrixinfer.config import Config, checked, convert
from matrixinfer.gateway.errors import error_response
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.server import Gateway

VARIABLE: Final = "MATRIXINFER_WORKER"
"""The environment variable by which a worker knows that it is one."""
SOCKETS_PATH: Final = "/worker/sockets"
MERGED_SECONDS: Final = 10.0
"""Deadline for the metrics of all workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """The private folder of a supervisor and its workers."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration in effect, with its secrets."""
        return self.path / "config.json"

    @property
    def secret(self) -> Path:
        """A secret of this gateway's workers, drawn at its start."""
        return self.path / "secret"

    @property
    def hub(self) -> Path:
        """The socket over which workers share loads and ejections."""
        return self.path / "hub"

    @property
    def front(self) -> Path:
        """The socket at which the supervisor answers its workers."""
        return self.path / "front"

    def admin(self, number: int) -> Path:
        """The socket of a worker's admin listener."""
        return self.path / f"worker-{number}"


class _Variable(msgspec.Struct, frozen=True):
    """The content of the environment variable."""

    number: int
    listens: list[int]
    alive: int
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One of several processes."""

    number: int
    """From 1 on; a replacement has the number of the one that died."""
    listens: tuple[int, ...]
    """File descriptors of the listening sockets of all workers, in the order of their numbers."""
    alive: int
    """File descriptor of a pipe that ends with the supervisor."""
    folder: Folder

    @property
    def hub(self) -> Path:
        """The socket over which workers share loads and ejections."""
        return self.folder.hub

    def configuration(self) -> Config:
        """The configuration in effect, with an access log of its own. Raises `ConfigError`."""
        config = checked(convert(msgspec.json.decode(self.folder.config.read_bytes()), Config, path="$"))
        log = config.access_log
        if log is None or log.path == "-":
            return config
        path = Path(log.path)
        own = str(path.with_name(f"{path.stem}-{self.number}{path.suffix}"))
        return msgspec.structs.replace(config, access_log=msgspec.structs.replace(log, path=own))

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """The socket of the API, and a new one for the admin listener."""
        path = self.folder.admin(self.number)
        path.unlink(missing_ok=True)  # of the worker that died
        admin = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        admin.bind(str(path))
        return self.socket_of(self.number), admin

    def socket_of(self, number: int) -> socket.socket:
        """The listening socket of a worker."""
        return socket.socket(fileno=os.dup(self.listens[number - 1]))

    def end_with_supervisor(self) -> None:
        """Drain when the supervisor has gone, as if it had sent a signal. Call it on the event loop."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self.alive)
            os.kill(os.getpid(), signal.SIGTERM)

        loop.add_reader(self.alive, ended)


def to_environment(worker: Worker) -> str:
    """The value of the environment variable."""
    passed = _Variable(worker.number, list(worker.listens), worker.alive, str(worker.folder.path))
    return msgspec.json.encode(passed).decode()


def from_environment(environment: Mapping[str, str]) -> Worker | None:
    """The worker that this process is; None if it is not a worker."""
    value = environment.get(VARIABLE)
    if value is None:
        return None
    passed = msgspec.json.decode(value, type=_Variable)
    return Worker(
        number=passed.number,
        listens=tuple(passed.listens),
        alive=passed.alive,
        folder=Folder(path=Path(passed.folder)),
    )


class Sockets:
    """`/worker/sockets/N`: the supervisor lets this worker serve the socket of one that has died, until that is replaced."""

    def __init__(self, worker: Worker, gateway: Callable[[], Gateway]) -> None:
        self._worker = worker
        self._gateway = gateway

    def routes(self) -> Routes:
        """Paths of a worker's own admin listener."""
        return {f"{SOCKETS_PATH}/": {"POST": self.adopt, "DELETE": self.release}}

    async def adopt(self, request: web.BaseRequest) -> web.StreamResponse:
        """Accept connections for another worker."""
        number = self._number(request)
        await self._gateway().adopt(number, self._worker.socket_of(number))
        return web.Response(status=204)

    async def release(self, request: web.BaseRequest) -> web.StreamResponse:
        """Leave further connections to it; those that were accepted stay."""
        self._gateway().release(self._number(request))
        return web.Response(status=204)

    def _number(self, request: web.BaseRequest) -> int:
        return int(request.rel_url.raw_path.rpartition("/")[2])


class MergedMetrics:
    """Answers `/metrics` at a worker's API with those of all workers.

    Merging costs the supervisor CPU time, and no key is needed to ask: requests that come meanwhile share the next answer.
    """

    def __init__(self, worker: Worker) -> None:
        self._path = str(worker.folder.front)
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[tuple[bytes, str] | None] | None = None

    async def expose(self, _: web.BaseRequest) -> web.StreamResponse:
        """Prometheus metrics."""
        if self._next is None:
            self._next = asyncio.create_task(self._in_turn(), name="merged metrics")
        found = await asyncio.shield(self._next)
        if found is None:
            return error_response(503, "The metrics of all workers cannot be read now.")
        body, content_type = found
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _in_turn(self) -> tuple[bytes, str] | None:
        async with self._turn:
            self._next = None  # requests from now on get later metrics
            return await self._ask()

    async def _ask(self) -> tuple[bytes, str] | None:
        with suppress(aiohttp.ClientError, OSError):
            connector = aiohttp.UnixConnector(self._path)
            timeout = aiohttp.ClientTimeout(total=MERGED_SECONDS)
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.get("http://front/metrics") as answer,
            ):
                if answer.status == 200:
                    return await answer.read(), answer.headers["Content-Type"]
        return None
