"""Lets a bounded number of requests through at a time. The others wait in a fair queue."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from matrixinfer.access.fair_queue import Entry, FairQueue, Standing
from matrixinfer.config.admission import AdmissionConfig
from matrixinfer.errors import Overloaded
from matrixinfer.telemetry.intervals import Intervals

RATE_SECONDS = 10.0
"""Time constant of the rate at which requests get their turn: what was counted this long ago counts a third."""
KNOWN_SECONDS = 2.0
"""The rate is unknown until requests have waited this long."""
_NOTED_SECONDS = 10.0
_PLAIN = Standing()

log = structlog.get_logger(__name__)


class Watch(Protocol):
    """Gets the counts and events of an admission."""

    def admission(self, running: int, waiting: int) -> None:
        """How many requests are let through and wait now."""
        ...

    def admitted(self, seconds: float) -> None:
        """A request had its turn after this long."""
        ...

    def shed(self, reason: str) -> None:
        """A request is not let through."""
        ...


class Pass:
    """One of the places. `leave` it once, when the request has ended."""

    __slots__ = ("_admission", "_cost", "_tenant", "waited")

    def __init__(self, admission: Admission, tenant: str, cost: int, *, waited: bool) -> None:
        self._admission = admission
        self._tenant = tenant
        self._cost = cost
        self.waited = waited

    def leave(self, cost: int | None) -> None:
        """The request has ended, and has cost so many tokens; None if that is not known."""
        self._admission.left(self._tenant, 0 if cost is None else cost - self._cost)


class Admission:
    """The places of one gateway, and who waits for them."""

    def __init__(
        self,
        config: AdmissionConfig,
        standings: Mapping[str, Standing],
        watch: Watch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._watch = watch
        self._clock = clock
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(config.queue_size, _of(standings))
        self._running = 0
        self._rate = Rate(clock)
        self._noted = Intervals(_NOTED_SECONDS, clock)

    def reconfigure(self, config: AdmissionConfig, standings: Mapping[str, Standing]) -> None:
        """Keep these bounds and treat tenants like this from now on. Whoever waits keeps its turn."""
        self._config = config
        self._queue.reconfigure(config.queue_size, _of(standings))
        self._serve()

    async def enter(self, tenant: str, cost: int) -> Pass:
        """Wait for a place for a request that costs so many tokens. Raises `Overloaded`."""
        if self._running < self._config.max_concurrent_requests and not len(self._queue):
            self._running += 1
            self._watch.admitted(0.0)
            self._report()
            return Pass(self, tenant, cost, waited=False)
        self._check_wait(tenant)
        began = self._clock()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry, displaced = self._queue.push(tenant, cost, turn)
        if displaced is not None:
            displaced.item.cancel("displaced")
        self._report()
        if displaced is entry:
            raise self._shed("full", "Too many requests wait.")
        try:
            await self._wait(entry)
        except TimeoutError:
            seconds = self._config.queue_timeout_seconds
            raise self._shed("timeout", f"No place for this request within {seconds:g} s.") from None
        self._watch.admitted(self._clock() - began)
        return Pass(self, tenant, cost, waited=True)

    def left(self, tenant: str, more: int) -> None:
        """A request that was let through has ended, and has cost `more` than expected."""
        self._running -= 1
        self._queue.settle(tenant, more)
        self._serve()

    async def _wait(self, entry: Entry[asyncio.Future[None]]) -> None:
        """Wait for the entry's turn. Raises `TimeoutError`, and `Overloaded` when another request displaced it."""
        turn = entry.item
        try:
            await asyncio.wait([turn], timeout=self._config.queue_timeout_seconds)
        except asyncio.CancelledError:  # the client has gone
            if turn.done() and not turn.cancelled():
                self._running -= 1
                self._serve()
            else:
                self._queue.drop(entry)
                self._report()
            raise
        if turn.cancelled():
            raise self._shed("displaced", "Too many requests of this tenant wait.")
        if not turn.done():
            self._queue.drop(entry)
            self._report()
            raise TimeoutError

    def _serve(self) -> None:
        while self._running < self._config.max_concurrent_requests:
            entry = self._queue.pop()
            if entry is None:
                break
            self._running += 1
            self._rate.add(int(entry.cost))
            entry.item.set_result(None)
        self._report()

    def _check_wait(self, tenant: str) -> None:
        """Raises `Overloaded` at once if a request would wait longer than it may."""
        rate = self._rate.per_second()
        ahead = self._queue.tokens_ahead(tenant)
        if rate is not None and ahead > rate * self._config.queue_timeout_seconds:
            seconds = ahead / rate if rate else math.inf
            raise self._shed("late", "Too many requests wait to be served in time.", seconds)

    def _shed(self, reason: str, message: str, seconds: float = 0.0) -> Overloaded:
        self._watch.shed(reason)
        if self._noted("requests_shed"):
            log.warning("requests_shed", reason=reason, running=self._running, waiting=len(self._queue))
        longest = self._config.queue_timeout_seconds
        return Overloaded(message, retry_after=min(max(1.0, seconds - longest), longest) if seconds else None)

    def _report(self) -> None:
        self._rate.waiting(len(self._queue) > 0)
        self._watch.admission(self._running, len(self._queue))


def _of(standings: Mapping[str, Standing]) -> Callable[[str], Standing]:
    return lambda tenant: standings.get(tenant, _PLAIN)


class Rate:
    """Tokens per second that get their turn while requests wait, as an exponential average."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None
        self._tokens = self._seconds = 0.0

    def waiting(self, is_waiting: bool) -> None:
        """From now on requests wait, or none does: then it is not known how many tokens could have had their turn."""
        if not is_waiting:
            self._last, self._tokens, self._seconds = None, 0.0, 0.0
        elif self._last is None:
            self._last = self._clock()

    def add(self, tokens: int) -> None:
        """So many had their turn."""
        self._pass_time()
        if self._last is not None:
            self._tokens += tokens

    def per_second(self) -> float | None:
        """The rate; None if it is not known."""
        self._pass_time()
        return self._tokens / self._seconds if self._seconds >= KNOWN_SECONDS else None

    def _pass_time(self) -> None:
        if self._last is None:
            return
        now = self._clock()
        kept = math.exp((self._last - now) / RATE_SECONDS)
        self._tokens *= kept
        self._seconds = self._seconds * kept + RATE_SECONDS * (1 - kept)
        self._last = now
