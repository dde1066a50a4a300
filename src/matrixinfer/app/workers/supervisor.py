"""Runs several workers that serve one address, and replaces those that die."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from matrixinfer.app.reload import ReloadCollector, Reloader
from matrixinfer.app.systemd import Notifier
from matrixinfer.app.workers.collector import WorkerCollector
from matrixinfer.app.workers.front import AdminFront
from matrixinfer.app.workers.process import WorkerProcess
from matrixinfer.app.workers.share import share_of
from matrixinfer.app.workers.sockets import listening_sockets
from matrixinfer.app.workers.worker import SOCKETS_PATH, Folder
from matrixinfer.config import Config, split_address
from matrixinfer.errors import ConfigError
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.guard import guarded
from matrixinfer.gateway.listener import Listener
from matrixinfer.gateway.reload_admin import outcome_response
from matrixinfer.gateway.tls import ListenerTls
from matrixinfer.prompt.memory import Memory
from matrixinfer.tasks import cancel_and_wait
from matrixinfer.telemetry.intervals import Intervals
from matrixinfer.traffic.peers.local import Hub

GRACE_SECONDS: Final = 10.0
"""How much longer than `drain` allows a worker may take to end before it is killed."""
CUT_SECONDS: Final = 10.0
"""The same after a second signal."""
_NOTED_SECONDS: Final = 10.0

log = structlog.get_logger(__name__)


class Supervisor:
    """A gateway of several processes. Use as an async context manager; leaving it drains all of them.

    Each worker has a listening socket of its own, so that the kernel deals out connections evenly, and the supervisor and
    the others have it, too: when a worker dies, another one serves its socket until it is replaced.
    """

    def __init__(
        self, config: Config, *, read: Callable[[], Config], config_file: Path | None, notifier: Notifier
    ) -> None:
        self.config = config
        self.workers: list[WorkerProcess] = []
        self._read = read
        self._config_file = config_file
        self._notifier = notifier
        self._draining = asyncio.Event()
        self._has_delay = False
        self._has_started = False
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._asking: set[asyncio.Task[object]] = set()

    async def __aenter__(self) -> Self:
        """Start the workers. Raises `ConfigError` when one cannot start, and `OSError` when an address is taken."""
        async with AsyncExitStack() as stack:
            path = Path(tempfile.mkdtemp(prefix="matrixinfer-"))  # for this user alone
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            self._folder = Folder(path=path)
            self._folder.secret.touch(mode=0o600)
            self._folder.secret.write_bytes(secrets.token_bytes())
            self._write(self.config)
            self._sockets = listening_sockets(self.config.listen, self.config.workers)
            for each in self._sockets:
                stack.enter_context(each)
            await stack.enter_async_context(Hub(self._folder.hub))
            self._start_workers(stack)
            reloader = Reloader(
                self.config,
                self._read,
                self._apply,
                file=self._config_file,
                on_begin=self._notifier.reloading,
                on_end=self._notifier.ready,
            )
            limits = share_of(self.config).limits
            self._bodies = Bodies(limits, Memory(limits.memory_bytes), Intervals(_NOTED_SECONDS, time.monotonic))
            self._front = AdminFront(self.workers, self._draining, self._bodies, self._own_metrics, self._reload)
            await stack.enter_async_context(self._front_listener())
            await self._all_ready()
            self._reloader = await stack.enter_async_context(reloader)
            admin = await self._open_admin(stack)
            self._has_started = True
            self._stack = stack.pop_all()
        host, port = self._sockets[0].getsockname()[:2]
        scheme = "http" if self.config.tls is None else "https"
        listen = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        log.info("gateway_started", listen=listen, admin=admin, workers=len(self.workers))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        drain = self._reloader.config.drain
        delay = drain.delay_seconds if self._has_delay else 0.0
        log.info("gateway_stopping", delay_seconds=delay, timeout_seconds=drain.timeout_seconds)
        self._draining.set()
        try:
            if kind is None:
                for each in self._sockets:
                    each.close()  # the workers still have them
                await self._end(delay + drain.timeout_seconds + GRACE_SECONDS)
        except asyncio.CancelledError:
            await self._end(CUT_SECONDS)
            raise
        finally:
            await self._stack.aclose()
            log.info("gateway_stopped")

    def delay_drain(self) -> None:
        """Let the workers serve for `drain.delaySeconds` before they take no more requests."""
        self._has_delay = True

    def reload_soon(self) -> None:
        """Read the configuration again."""
        if self._has_started:
            self._reloader.reload_soon()

    def _start_workers(self, stack: AsyncExitStack) -> None:
        listens = tuple(each.fileno() for each in self._sockets)
        alive, own = os.pipe()
        stack.callback(os.close, own)
        stack.callback(os.close, alive)
        for number in range(1, self.config.workers + 1):
            worker = WorkerProcess(number, listens, alive, self._folder, on_ready=self._ready, on_died=self._died)
            self.workers.append(worker)
            task = asyncio.create_task(worker.keep(), name=f"worker {number}")
            self._tasks.append(task)
            stack.push_async_callback(cancel_and_wait, task)

    async def _end(self, seconds: float) -> None:
        """Let every worker end within `seconds`. Those that do not are killed when their tasks are cancelled."""
        number = signal.SIGTERM if self._has_delay else signal.SIGINT
        for worker in self.workers:
            worker.signal(number)
        await asyncio.wait(self._tasks, timeout=seconds)

    async def _all_ready(self) -> None:
        """Wait until every worker serves. Raises `ConfigError` when one has died before."""
        for worker in self.workers:
            while not worker.is_ready.is_set():
                if worker.restarts:
                    raise ConfigError("serve", f"a worker ended with exit code {worker.exit_code} while it started")
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await worker.is_ready.wait()

    def _ready(self, worker: WorkerProcess) -> None:
        """A worker serves. If it replaces one that died, tell it what operators have changed."""
        if self._has_started:
            log.info("worker_replaced", worker=worker.number)
            self._begin(self._front.catch_up(worker))
        for other in self.workers:
            if other is not worker:
                self._begin(other.ask("DELETE", f"{SOCKETS_PATH}/{worker.number}"))

    def _died(self, worker: WorkerProcess) -> None:
        """A worker has died: another one serves its socket meanwhile."""
        other = next((each for each in self.workers if each.is_ready.is_set()), None)
        if other is not None:
            self._begin(other.ask("POST", f"{SOCKETS_PATH}/{worker.number}"))

    def _begin(self, work: Coroutine[object, object, object]) -> None:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def _front_listener(self) -> Listener:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bound.bind(str(self._folder.front))
        return Listener("front", 0, self._front.status_routes(), self._draining, bound=bound)

    async def _open_admin(self, stack: AsyncExitStack) -> str | None:
        if self.config.admin is None:
            return None
        routes = guarded(self._front.routes(), self.config.admin_names)
        address = split_address(self.config.admin, path="$.admin")
        tls = None if self.config.admin_tls is None else ListenerTls(self.config.admin_tls, "$.adminTls")
        listener = Listener(*address, routes, self._draining, connections=self.config.connections, tls=tls)
        return (await stack.enter_async_context(listener)).url

    def _write(self, config: Config) -> None:
        """Let new workers start with this configuration, and others read it when they are asked to."""
        new = self._folder.config.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(msgspec.json.encode(share_of(config)))
        new.replace(self._folder.config)

    async def _apply(self, config: Config) -> None:
        """Put a configuration into effect at every worker, or at none."""
        before = self.config
        self._write(config)
        try:
            await self._reload_workers()
        except ConfigError:
            self._write(before)
            with suppress(ConfigError):
                await self._reload_workers()
            raise
        self.config = config
        self._bodies.reconfigure(share_of(config).limits)

    async def _reload_workers(self) -> None:
        answers = await asyncio.gather(*(each.ask("POST", "/admin/reload") for each in self.workers))
        for worker, answer in zip(self.workers, answers, strict=True):
            if answer is not None and answer.status != 200:  # one that is not there reads it when it starts
                raise ConfigError("$", f"worker {worker.number} refuses it: {answer.body[:500].decode()}")

    async def _reload(self) -> web.StreamResponse:
        return outcome_response(asdict(await self._reloader.reload("admin")))

    def _own_metrics(self) -> bytes:
        registry = CollectorRegistry()
        registry.register(WorkerCollector(self.workers))
        if self._has_started:
            registry.register(ReloadCollector(self._reloader))
        return generate_latest(registry)
