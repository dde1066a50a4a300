"""Writes what pods hold into Redis: in order, in bounded batches, fenced, and anew from its own account where in doubt.

A pod has one writer at a time: who holds its fencing token. Every write of another one is refused, in the same step as it
would be done; on Cluster, where blocks lie elsewhere than tokens, in the step before, and all that is held is stamped anew
every `RECONCILE_SECONDS`, which heals what slipped in between.

What was written before a token was taken, before the server was lost, or beyond what may wait is in doubt. Then all that
the pod holds is written anew with stamps of an epoch to come, and once that is done the epoch begins: readers see what
was there before until they see what is there now, and never an empty pod.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

import structlog

from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis.commands import Commands, Fenced, Lease
from matrixinfer.index.redis.outbox import Change, Clear, Outbox
from matrixinfer.index.redis.pod_record import PodRecord
from matrixinfer.index.redis.store import Store
from matrixinfer.tasks import cancel_and_wait

BATCH = 1_000
"""Blocks per write, which the server does in about a millisecond."""
WAITING_MAX = 200_000
"""Blocks of one pod that may wait to be written."""
LEASE_SECONDS = 15.0
"""From a sign of life of a writer until it is taken for dead; there are three in that time."""
RELEASE_SECONDS = 2.0
"""For giving all pods to the next writer, at the end."""
TICK_SECONDS = 1.0
RECONCILE_SECONDS = 60.0
"""On Cluster, from one writing of all that is held to the next."""
RETRY_SECONDS, RETRY_MAX_SECONDS = 0.2, 5.0

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class WriterStats:
    """Counts since the start."""

    blocks: int = 0
    """Added or removed in Redis."""
    batches: int = 0
    failures: int = 0
    """Writes that the server did not take."""
    fenced: int = 0
    """Times that another writer had come for a pod."""
    resyncs: int = 0
    """Times that all that a pod holds was written anew."""
    overflows: int = 0
    """Times that more waited than may."""
    restamped: int = 0


class BlockWriter:
    """Owns one task that writes. Use as an async context manager; the calls that change pods return at once.

    `clock` is Unix time in seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        meta: dict[str, str],
        max_age: float,
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.time,
        name: str | None = None,
    ) -> None:
        self.stats = WriterStats()
        self.name = name or uuid.uuid4().hex
        self.state_of: Callable[[str], str | None] = lambda _: None
        """What is to be told of a pod, as JSON; None for nothing."""
        self.is_known: Callable[[str], bool] = lambda _: True
        """Whether what was added here is what the pod holds. Until then what is in Redis stays as it is."""
        self._store = store
        self._commands = Commands(store, meta)
        self._told_models: set[str] = set()
        self._clock = clock
        self._lease = lease
        self._restamp_seconds = min(RECONCILE_SECONDS if store.is_cluster else float("inf"), 0.9 * max_age / 3)
        self._pods: dict[str, PodRecord] = {}
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._server: str | None = None
        self._broken = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="redis-writer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_and_wait(self._task)
        with suppress(IndexUnavailable, TimeoutError):
            async with asyncio.timeout(RELEASE_SECONDS):
                for name, pod in list(self._pods.items()):
                    await self._hand_over(name, pod)

    async def _hand_over(self, name: str, pod: PodRecord) -> None:
        """Write what still waits, so that what was removed last is not claimed, and let another writer come at once."""
        if pod.hold is None:
            return
        try:
            if not pod.doubtful and not pod.outbox.overflowed:
                await self._write_changes(pod, pod.hold)
            await self._commands.release(pod.hold)
        except Fenced:
            log.info("redis_writer_fenced", pod=name)

    # What pods hold

    def add(self, model: str, pod: str, hashes: Sequence[int]) -> None:
        """`pod` now holds `hashes`."""
        self._of(pod).outbox.add(model, hashes)
        self._wake()

    def remove(self, model: str, pod: str, hashes: Sequence[int]) -> None:
        """`pod` no longer holds `hashes`."""
        if pod in self._pods:
            self._pods[pod].outbox.remove(model, hashes)
            self._wake()

    def clear(self, pod: str) -> None:
        """`pod` holds nothing."""
        if pod in self._pods:
            self._pods[pod].outbox.clear()
            self._wake()

    def forget(self, pod: str) -> None:
        """As `clear`, and nobody vouches for the pod any more."""
        if pod in self._pods:
            self.clear(pod)
            self._pods[pod].leaving = True

    def follow(self, pod: str) -> None:
        """Be the pod's writer, although there is nothing to write yet."""
        self._of(pod)
        self._wake()

    @property
    def pods(self) -> list[str]:
        """Whose writer this is or wants to be."""
        return list(self._pods)

    def needs_resync(self, pod: str) -> bool:
        """Whether what is in Redis may not be what the pod holds, as far as this writer knows."""
        return pod not in self._pods or self._pods[pod].doubtful or self._pods[pod].outbox.overflowed

    def is_writer(self, pod: str) -> bool:
        """Whether it holds the pod's token."""
        return pod in self._pods and self._pods[pod].hold is not None

    @property
    def waiting(self) -> int:
        """Blocks that wait to be written."""
        return sum(pod.outbox.waiting for pod in self._pods.values())

    def held(self, pod: str) -> Outbox | None:
        """What a pod holds, by this writer's account."""
        return self._pods[pod].outbox if pod in self._pods else None

    async def flush(self) -> None:
        """Wait until all is written that can be. Raises `IndexUnavailable` when that takes too long."""
        try:
            async with asyncio.timeout(2 * RETRY_MAX_SECONDS):
                await self._idle.wait()
        except TimeoutError as error:
            raise IndexUnavailable(f"{self._store.config.where} does not take what is to be written") from error

    def _of(self, pod: str) -> PodRecord:
        found = self._pods.get(pod)
        if found is None:
            found = self._pods[pod] = PodRecord(WAITING_MAX)
        found.leaving = False
        return found

    def _wake(self) -> None:
        self._idle.clear()
        self._wanted.set()

    # The task

    async def _run(self) -> None:
        pause = RETRY_SECONDS
        while True:
            try:
                await self._round()
                pause = RETRY_SECONDS
            except IndexUnavailable as error:
                self.stats.failures += 1
                if not self._broken:
                    log.warning("redis_writes_failed", server=self._store.config.where, error=str(error))
                self._broken = True
                for pod in self._pods.values():
                    pod.renew_at, pod.unanswered = float("-inf"), True
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX_SECONDS)
            except Exception:
                # Supervision boundary: whatever is wrong with one round, the next one writes all anew.
                log.exception("redis_writer_failed")
                self._doubt_all()
                await asyncio.sleep(RETRY_MAX_SECONDS)

    async def _round(self) -> None:
        """Write all that waits, then wait for more, or for the next tick."""
        await self._know_server()
        self._wanted.clear()
        for name, pod in list(self._pods.items()):
            await self._write_pod(name, pod)
        if any(pod.pending for pod in self._pods.values()):
            return
        self._idle.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(TICK_SECONDS):
                await self._wanted.wait()

    async def _know_server(self) -> None:
        """After a failure, and now and then: is it the same server process? Another one may lack the last writes."""
        if not self._broken and not any(map(self._is_due, self._pods.values())):
            return
        server = await self._store.server_id()
        if (self._server is not None and server != self._server) or (server is None and self._broken):
            log.warning("redis_server_changed", server=self._store.config.where)
            self._doubt_all()
        self._server = server
        if self._broken:
            log.info("redis_writes_resumed", server=self._store.config.where)
        self._broken = False

    def _doubt_all(self) -> None:
        self._told_models.clear()
        for pod in self._pods.values():
            pod.lose()

    async def _write_pod(self, name: str, pod: PodRecord) -> None:
        try:
            if not await self._is_fit(name, pod):
                return
            if self._is_due(pod):
                await self._acquire(name, pod)
            if pod.hold is None:
                pod.outbox.drop()
                if pod.leaving:
                    del self._pods[name]
                return
            await self._bring_up_to_date(pod, pod.hold)
            if pod.leaving and not pod.outbox.waiting:
                await self._commands.release(pod.hold, gone=True)
                pod.lose()
                if pod.leaving:  # it may have come back meanwhile
                    del self._pods[name]
        except Fenced:
            log.warning("redis_writer_fenced", pod=name)
            self.stats.fenced += 1
            pod.lose()

    async def _is_fit(self, name: str, pod: PodRecord) -> bool:
        """Whether to be the pod's writer: not before it is known what it holds, nor for long when that is lost."""
        if pod.leaving or self.is_known(name):
            pod.unknown_since = None
            return True
        now = self._clock()
        pod.unknown_since = now if pod.unknown_since is None else min(now, pod.unknown_since)
        if pod.hold is not None and now - pod.unknown_since <= self._lease:
            return True
        if pod.hold is not None:
            log.warning("redis_writer_blind", pod=name)
            await self._commands.release(pod.hold)
            pod.lose()
        pod.outbox.drop()
        return False

    def _is_due(self, pod: PodRecord) -> bool:
        """Whether its lease is to be renewed: it is time, or the clock has been set back."""
        return not pod.renew_at - self._lease < self._clock() < pod.renew_at

    async def _acquire(self, name: str, pod: PodRecord) -> None:
        """Take or renew the pod's token; a new one where a late write with the old one must not be done any more."""
        now, anew = self._clock(), pod.unanswered
        hold = await self._commands.acquire(name, self.name, now=now, lease=self._lease, anew=anew)
        if hold is None or pod.hold is None or hold.token != pod.hold.token + anew:
            pod.lose()
        pod.hold, pod.renew_at, pod.unanswered = hold, now + self._lease / 3, False

    async def _bring_up_to_date(self, pod: PodRecord, hold: Lease) -> None:
        if pod.outbox.overflowed:
            self.stats.overflows += 1
            pod.doubtful = True
        if pod.doubtful and pod.unknown_since is not None:
            pod.outbox.drop()
        elif pod.doubtful:
            hold = await self._resync(pod, hold.pod)
        await self._write_changes(pod, hold)
        state = self.state_of(hold.pod)
        if state is not None and state != pod.state:
            await self._commands.tell(hold, state)
            pod.state = state
        await self._restamp(pod, hold)

    async def _resync(self, pod: PodRecord, name: str) -> Lease:
        """Write all that the pod holds anew, and let what is not part of it count no more."""
        self.stats.resyncs += 1
        await self._acquire(name, pod)  # the epoch to come has to be above whatever has been stamped until now
        if (hold := pod.hold) is None:
            raise Fenced
        pod.outbox.drop()
        self._told_models.difference_update(pod.outbox.models)  # an operator may have purged them
        pod.least = hold.next_epoch
        for model, blocks in list(pod.outbox.held):
            for start in range(0, len(blocks), BATCH):
                await self._write(pod, hold, [Change(model, "+", blocks[start : start + BATCH])])
                await self._renew_due(hold)
        await self._commands.set_epoch(hold, pod.least, now=self._clock())
        pod.doubtful = False
        pod.restamping, pod.restamp_at = iter(()), self._clock() + self._restamp_seconds
        return hold

    async def _write_changes(self, pod: PodRecord, hold: Lease) -> None:
        while (taken := pod.outbox.take(BATCH)) is not None:
            try:
                if isinstance(taken, Clear):
                    await self._commands.set_epoch(hold, 0, now=self._clock())
                else:
                    await self._write(pod, hold, taken)
            except IndexUnavailable:
                pod.outbox.put_back(taken)
                raise
            await self._renew_due(hold)

    async def _renew_due(self, hold: Lease) -> None:
        """Renew what is held while much is written, so that nobody is taken for dead. Raises `Fenced` when `hold` is lost."""
        for name, pod in list(self._pods.items()):
            if pod.hold is not None and self._is_due(pod):
                await self._acquire(name, pod)
        mine = self._pods.get(hold.pod)
        if mine is None or mine.hold is None or mine.hold.token != hold.token:
            raise Fenced

    async def _write(self, pod: PodRecord, hold: Lease, changes: Sequence[Change]) -> None:
        for model in {change.model for change in changes} - self._told_models:
            await self._commands.tell_scheme(model)
            self._told_models.add(model)
        await self._commands.write(hold, changes, now=self._clock(), least=pod.least)
        self.stats.batches += 1
        self.stats.blocks += sum(len(change.blocks) for change in changes)

    async def _restamp(self, pod: PodRecord, hold: Lease) -> None:
        """Stamp some of what the pod holds anew: blocks that are only hit are never written otherwise, and must not age."""
        now = self._clock()
        if now >= pod.restamp_at:
            pod.restamp_at = now + self._restamp_seconds
            if self._store.is_cluster:
                pod.doubtful = True  # a failover may have lost removals and epochs, too, and nothing tells of it
                return
            pod.restamping = ((model, block) for model, blocks in list(pod.outbox.held) for block in blocks)
            pod.pace = max(BATCH, int(2 * len(pod.outbox) * TICK_SECONDS / self._restamp_seconds))
        left = pod.pace
        while left > 0 and (some := list(islice(pod.restamping, BATCH))):
            left -= len(some)
            by_model: dict[str, list[int]] = {}
            for model, block in some:
                if block in pod.outbox.blocks_of(model):
                    by_model.setdefault(model, []).append(block)
            if by_model:
                await self._write(pod, hold, [Change(model, "+", blocks) for model, blocks in by_model.items()])
                self.stats.restamped += sum(map(len, by_model.values()))
