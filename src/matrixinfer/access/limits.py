"""Reserves what a request may use before it is sent, and settles it by what the engine reports.

Counted in this process, or in Redis for all gateways. While Redis does not answer, each gateway counts on its own.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias

import structlog

from matrixinfer.access.callers import Caller
from matrixinfer.access.limit_answers import exceeded, headers_of
from matrixinfer.access.quota import NOTHING, Amounts, Ledger, Verdict, is_limited, slice_at
from matrixinfer.access.shared import LEASE_SECONDS, SharedLedger
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis.circuit import Circuit
from matrixinfer.index.redis.store import is_refused
from matrixinfer.tasks import cancel_all, cancel_and_wait

FAILURES = 3
"""Failures in a row after which this gateway counts on its own for a while. One failure affects only its request."""
TURNS = 25
"""How many deadlines of lookups a reservation waits for Redis, each for at least a turn of the event loop.

Lookups may do without an answer; limits would be exceeded. A burst that keeps this process busy is no sign of a lost server.
"""
RENEW_SECONDS = LEASE_SECONDS / 3
RETRY_SECONDS = 0.5
REFUSALS = 5
"""How often Redis may refuse to settle a request before the next one is settled."""
MAX_UNSETTLED = 100_000
"""Requests that have ended and are not settled in Redis yet; the oldest are dropped beyond it, and stay as reserved."""
MAX_ABANDONED = 1000
"""Reservations that nobody waits for any more, but that Redis may still make."""

Reserved: TypeAlias = tuple[Verdict, int]
"""What became of a reservation, and the slice in which the request began."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reservation:
    """What was taken for a request."""

    account: str
    request: str
    number: int
    """The slice in which it began."""
    taken: Amounts
    is_shared: bool
    headers: Mapping[str, str]
    """What is left, for the answer."""


class Limits:
    """The limits of all callers. Use as an async context manager. `shared` counts for all gateways, if given.

    A request waits for it for `TURNS` times `deadline_seconds`. `on_degraded` is called with True when this gateway begins
    to count on its own, and with False when it stops.
    """

    def __init__(
        self,
        shared: SharedLedger | None = None,
        *,
        deadline_seconds: float = 0.02,
        on_degraded: Callable[[bool], None] = lambda _: None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared = shared
        self._deadline = deadline_seconds
        self._on_degraded = on_degraded
        self._now = now
        self._ledger = Ledger()
        self._circuit = Circuit(clock, failures=FAILURES)
        self.is_degraded = False
        """Whether each gateway counts on its own, because Redis does not answer."""
        self._unsettled: deque[tuple[Reservation, Amounts]] = deque(maxlen=MAX_UNSETTLED)
        self._abandoned: set[asyncio.Task[Reserved]] = set()
        self._running: defaultdict[str, set[str]] = defaultdict(set)
        self._wanted = asyncio.Event()
        self._is_closing = False
        self._process, self._numbers = uuid.uuid4().hex, itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def unsettled(self) -> int:
        """Requests that have ended and are not settled in Redis yet."""
        return len(self._unsettled)

    async def __aenter__(self) -> Self:
        if self._shared is not None:
            for work in (self._settle_all, self._renew_all):
                self._tasks.append(asyncio.create_task(work(self._shared), name="limits"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._wanted.set()
        if self._tasks:  # what stays unsettled leaves the window by itself, and leases end
            await asyncio.wait(self._tasks[:1], timeout=RETRY_SECONDS)
        for task in self._tasks:
            await cancel_and_wait(task)
        await cancel_all(self._abandoned)

    async def reserve(self, caller: Caller, amounts: Amounts) -> Reservation | None:
        """Take what a request may use; None if nothing limits the caller. Raises `LimitExceeded`."""
        quota = caller.quota
        if not is_limited(quota):
            return None
        # A limit that a request cannot keep because of what it merely may generate would refuse every such request.
        if quota.output_tokens is not None:
            amounts = amounts._replace(output_tokens=min(amounts.output_tokens, quota.output_tokens))
        request = f"{self._process}:{next(self._numbers)}"  # clients may give several requests one id
        found = await self._reserve_shared(caller, request, amounts)
        is_shared = found is not None
        if found is None:
            now = self._now()
            found = self._ledger.reserve(caller.account, quota, amounts, now), slice_at(quota, now)
        verdict, number = found
        if verdict.refused_by is not None:
            raise exceeded(quota, verdict, amounts)
        if is_shared:
            self._running[caller.account].add(request)
        return Reservation(
            account=caller.account,
            request=request,
            number=number,
            taken=amounts,
            is_shared=is_shared,
            headers=headers_of(quota, verdict, amounts),
        )

    def settle(self, reservation: Reservation, used: Amounts) -> None:
        """The request has ended, and used this much. Call it once."""
        change = used.minus(reservation.taken)
        if not reservation.is_shared:
            self._ledger.settle(reservation.account, reservation.number, change)
            return
        running = self._running[reservation.account]
        running.discard(reservation.request)
        if not running:
            del self._running[reservation.account]
        self._unsettled.append((reservation, change))
        self._wanted.set()

    async def _reserve_shared(self, caller: Caller, request: str, amounts: Amounts) -> Reserved | None:
        """As `SharedLedger.reserve`; None if this process must count on its own."""
        if self._shared is None or not self._circuit.admits():
            return None
        try:
            found = await self._patiently(self._shared, caller, request, amounts)
        except (IndexUnavailable, TimeoutError) as error:
            self._circuit.failed()
            if self._circuit.state != "closed":
                self._degrade(str(error) or "no answer in time")
            return None
        except BaseException:
            self._circuit.abandoned()
            raise
        self._circuit.succeeded()
        if self.is_degraded:
            self.is_degraded = False
            self._on_degraded(False)
            log.info("limits_shared_again")
        return found

    async def _patiently(self, shared: SharedLedger, caller: Caller, request: str, amounts: Amounts) -> Reserved:
        """Raises `IndexUnavailable`, and `TimeoutError` when there is no answer in time."""
        task = asyncio.create_task(shared.reserve(caller.account, caller.quota, amounts, request))
        try:
            for _ in range(TURNS):
                if (await asyncio.wait((task,), timeout=self._deadline))[0]:
                    return task.result()
        except asyncio.CancelledError:  # the client has gone
            self._abandon(task, caller.account, request, amounts)
            raise
        self._abandon(task, caller.account, request, amounts)  # this process counts on its own
        raise TimeoutError

    def _abandon(self, task: asyncio.Task[Reserved], account: str, request: str, taken: Amounts) -> None:
        """Give a reservation back once it is made. Cancelling is not enough: Redis may have read the command."""
        if len(self._abandoned) >= MAX_ABANDONED:
            task.cancel()
            return
        self._abandoned.add(task)
        task.add_done_callback(partial(self._give_back, account, request, taken))

    def _give_back(self, account: str, request: str, taken: Amounts, task: asyncio.Task[Reserved]) -> None:
        self._abandoned.discard(task)
        if task.cancelled() or task.exception() is not None:
            return  # if Redis has made it nevertheless, its lease ends
        verdict, number = task.result()
        if verdict.refused_by is None:
            made = Reservation(account=account, request=request, number=number, taken=taken, is_shared=True, headers={})
            self.settle(made, NOTHING)

    def _degrade(self, reason: str) -> None:
        if not self.is_degraded:
            self.is_degraded = True
            self._on_degraded(True)
            log.warning("limits_not_shared", reason=reason, note="each gateway counts on its own until Redis answers")

    async def _settle_all(self, shared: SharedLedger) -> None:
        refusals = 0
        while True:
            while self._unsettled:
                reservation, change = self._unsettled[0]
                try:
                    await shared.settle(reservation.account, reservation.request, reservation.number, change)
                except IndexUnavailable as error:
                    refusals += is_refused(error)
                    if refusals <= REFUSALS:
                        await asyncio.sleep(RETRY_SECONDS)
                        continue
                    log.warning("limit_not_settled", reason=str(error), note="the request counts as it was reserved")
                refusals = 0
                if self._unsettled and self._unsettled[0][0] is reservation:  # else dropped meanwhile
                    self._unsettled.popleft()
            if self._is_closing:
                return
            self._wanted.clear()
            await self._wanted.wait()

    async def _renew_all(self, shared: SharedLedger) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            for account, requests in list(self._running.items()):
                try:
                    await shared.renew(account, list(requests))
                except IndexUnavailable as error:
                    if not is_refused(error):
                        break
