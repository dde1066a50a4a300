"""Threads for prompts that are too large for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from matrixinfer.errors import Overloaded, TokenizeError
from matrixinfer.prompt.effort import Abandoned, Effort

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 2
_MAX_READING = 256
_READ_SECONDS = 30.0


class _FullError(Exception):
    """Too many jobs wait already."""


class Workers:
    """A few threads with a queue of at most `limit` jobs.

    A job whose caller is cancelled, or that runs for longer than `seconds`, ends at its next `effort.check`.
    """

    def __init__(self, name: str, *, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=name)
        self._jobs: dict[asyncio.Future[Any], Effort] = {}

    def __len__(self) -> int:
        """Jobs that wait or run, also those that nobody waits for any more."""
        return len(self._jobs)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in a thread. Raises `_FullError` if there are too many jobs, and what `work` raises."""
        if len(self._jobs) >= self._limit:
            raise _FullError
        effort = Effort(self._seconds)

        def job() -> T:
            with effort:
                effort.check()
                return work(*args, **kwargs)

        future = asyncio.get_running_loop().run_in_executor(self._threads, job)
        self._jobs[future] = effort
        future.add_done_callback(self._ended)
        try:
            # Not cancelled with its caller: a job counts until a thread has dropped it.
            await asyncio.wait((future,))
            return future.result()
        except asyncio.CancelledError:
            effort.stop()
            raise
        finally:
            del future  # its exception has this frame in its traceback: a cycle, which would keep what was decoded

    def _ended(self, job: asyncio.Future[Any]) -> None:
        del self._jobs[job]
        if not job.cancelled():
            job.exception()  # if its caller has gone, nobody else asks for it

    def close(self) -> None:
        """End all jobs, without waiting for them."""
        for effort in list(self._jobs.values()):
            effort.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)


class Lanes:
    """Workers for large bodies to be read, and for prompts to be tokenized: short ones never wait behind long ones."""

    def __init__(self, *, limit: int, seconds: float) -> None:
        self._limit = limit
        self._reading = Workers("read", limit=_MAX_READING, seconds=_READ_SECONDS)
        self._short = Workers("tokenize-short", limit=limit, seconds=seconds)
        self._long = Workers("tokenize-long", limit=limit, seconds=seconds)

    def __len__(self) -> int:
        return len(self._reading) + len(self._short) + len(self._long)

    async def read(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Read a large body. Raises `Overloaded` if that has to wait for too long, and what `work` raises."""
        try:
            async with asyncio.timeout(_READ_SECONDS):
                return await self._reading.run(work, *args, **kwargs)
        except (_FullError, Abandoned, TimeoutError) as error:
            raise Overloaded("Too many large requests are being read. Try again later.") from error

    async def tokenize(self, long: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Tokenize a prompt. Raises `TokenizeError` if too many are waiting, and what `work` raises."""
        try:
            return await (self._long if long else self._short).run(work, *args, **kwargs)
        except _FullError as error:
            raise TokenizeError(f"{self._limit} prompts are already waiting to be tokenized") from error

    def close(self) -> None:
        """End all jobs, without waiting for them."""
        for workers in (self._reading, self._short, self._long):
            workers.close()
