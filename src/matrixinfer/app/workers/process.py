"""One worker as its supervisor sees it: a process that is started again when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

import aiohttp
import structlog

from matrixinfer.app.workers.worker import VARIABLE, Folder, Worker, to_environment
from matrixinfer.telemetry.merged import Families, Key, counted, parsed

START_SECONDS: Final = 120.0
"""How long a worker may take until it serves; then it is killed, and started again."""
ASK_SECONDS: Final = 30.0
"""Deadline of a question to a worker."""
SOON_SECONDS: Final = 10.0
"""A worker that lasted for less rests before it is started again."""
MAX_REST_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.05
_FOREIGN: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""What is said to the supervisor alone."""

log = structlog.get_logger(__name__)


class Answer(NamedTuple):
    """What a worker answered over HTTP."""

    status: int
    body: bytes
    content_type: str


class WorkerProcess:
    """Keeps one worker running. `on_ready` is called whenever it begins to serve, `on_died` when it ends unasked."""

    def __init__(
        self,
        number: int,
        listens: tuple[int, ...],
        alive: int,
        folder: Folder,
        *,
        on_ready: Callable[[WorkerProcess], None],
        on_died: Callable[[WorkerProcess], None],
    ) -> None:
        self.number = number
        self.is_ready = asyncio.Event()
        self.restarts = 0
        self.exit_code: int | None = None
        """With which it died the last time."""
        self.gone: dict[Key, float] = {}
        """What its processes that have died had counted, as far as it was ever asked."""
        self._seen: Families | None = None
        self._worker = Worker(number=number, listens=listens, alive=alive, folder=folder)
        self._on_ready = on_ready
        self._on_died = on_died
        self._process: asyncio.subprocess.Process | None = None
        self._is_stopping = False
        self._client: aiohttp.ClientSession | None = None

    async def keep(self) -> None:
        """Run the worker, again and again, until it is told to stop."""
        rest, loop = 0.0, asyncio.get_running_loop()
        while not self._is_stopping:
            began = loop.time()
            await self._run()
            self.is_ready.clear()
            if self._is_stopping:
                return
            lasted = loop.time() - began
            rest = 0.0 if lasted > SOON_SECONDS else min(MAX_REST_SECONDS, 2 * rest or 0.1)
            log.warning("worker_died", worker=self.number, exit_code=self.exit_code, lasted_seconds=round(lasted, 1))
            self.restarts += 1
            self._on_died(self)
            await asyncio.sleep(rest)

    def signal(self, number: signal.Signals) -> None:
        """Send the worker a signal that ends it, in its own way."""
        self._is_stopping = True
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer | None:
        """What the worker's admin listener answers; None if it is not there."""
        if not self.is_ready.is_set() or self._client is None:
            return None
        try:
            async with self._client.request(method, f"http://worker{path}", data=body) as response:
                return Answer(response.status, await response.read(), response.headers.get("Content-Type", ""))
        except (aiohttp.ClientError, OSError):  # a `TimeoutError` is one
            return None

    async def metrics(self) -> Families | None:
        """Its metrics; None if it is not there."""
        answer = await self.ask("GET", "/metrics")
        if answer is None or answer.status != 200:
            return None
        self._seen = parsed(answer.body.decode())
        return self._seen

    async def _run(self) -> None:
        """Start the process, and wait until it has ended."""
        environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        connector = aiohttp.UnixConnector(str(self._worker.folder.admin(self.number)))
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "matrixinfer", "serve"),
            env={**environment, VARIABLE: to_environment(self._worker)},
            pass_fds=(*self._worker.listens, self._worker.alive),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
        )
        try:
            async with aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=ASK_SECONDS)
            ) as self._client:
                waiting = asyncio.create_task(self._wait_until_ready())
                try:
                    self.exit_code = await process.wait()
                finally:
                    waiting.cancel()
        finally:
            self._client = None
            self._keep_counts()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _wait_until_ready(self) -> None:
        """Ask until it answers. A process that does not come to that is killed."""
        process, client = self._process, self._client
        assert process is not None  # noqa: S101 - it was started just now
        assert client is not None  # noqa: S101
        try:
            async with asyncio.timeout(START_SECONDS):
                while True:
                    with suppress(aiohttp.ClientError, OSError):
                        async with client.get("http://worker/health") as response:
                            if response.status == 200:
                                break
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            process.kill()
            return
        self.is_ready.set()
        self._on_ready(self)

    def _keep_counts(self) -> None:
        for key, value in counted(self._seen or {}):
            self.gone[key] = self.gone.get(key, 0.0) + value
        self._seen = None
