"""Writes the blocks that pods hold to Redis: in order, in bounded batches, and protected by fencing tokens.

A pod has one writer at a time: the one with its current fencing token. The server refuses writes with an older token, in
the same atomic step as the write. On Cluster, where blocks and tokens are in different slots, it refuses them in the
step before the write, and the writer resyncs the pod every `RECONCILE_SECONDS` to repair writes that slipped through.

A resync is needed after a lease was taken, after the server was lost or replaced, and after the outbox overflowed: then
Redis may hold anything for the pod. The writer writes all blocks of the pod again, with stamps of a future epoch, and
then starts that epoch. Until then readers see the old blocks, after that the new ones, and never an empty pod.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
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
"""Blocks per write. The server executes one in about a millisecond."""
WAITING_MAX = 200_000
"""Limit of blocks of one pod that wait to be written."""
LEASE_SECONDS = 15.0
"""Time after which a silent writer is considered dead. It renews its leases three times in that time."""
RELEASE_SECONDS = 2.0
"""Deadline for releasing all leases at the end."""
TICK_SECONDS = 1.0
RECONCILE_SECONDS = 60.0
"""Time between two resyncs on Cluster."""
RETRY_SECONDS, RETRY_MAX_SECONDS = 0.2, 5.0

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class WriterStats:
    """Counters since the start."""

    blocks: int = 0
    """Blocks added or removed in Redis."""
    batches: int = 0
    failures: int = 0
    """Rounds of writing that failed."""
    fenced: int = 0
    """How often another writer had taken over a pod."""
    resyncs: int = 0
    """How often all blocks of a pod were written again."""
    overflows: int = 0
    """How often a pod's outbox overflowed."""
    restamped: int = 0
    """Blocks written again only to renew their stamps."""


class BlockWriter:
    """Owns one task that writes. Use as an async context manager; calls that change a pod return immediately.

    `meta` are the fields that describe how blocks are hashed (`index.scheme_of`). `max_age` and `lease_seconds` are in
    seconds; `clock` returns Unix seconds. `state_of` returns the state to publish for a pod, as JSON, or None for no
    state. `is_known` says whether the blocks added here are what the pod holds; until then the pod's entries in Redis
    stay unchanged. By default no state is published and every pod is known.
    """

    def __init__(
        self,
        store: Store,
        *,
        meta: dict[str, str],
        max_age: float,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.time,
        name: str | None = None,
        state_of: Callable[[str], str | None] | None = None,
        is_known: Callable[[str], bool] | None = None,
    ) -> None:
        self.stats = WriterStats()
        self.name = name or uuid.uuid4().hex
        self._state_of = state_of or (lambda _: None)
        self._is_known = is_known or (lambda _: True)
        self._store = store
        self._commands = Commands(store, meta)
        self._published_schemes: set[str] = set()
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._restamp_seconds = min(RECONCILE_SECONDS if store.is_cluster else float("inf"), 0.9 * max_age / 3)
        self._pods: dict[str, PodRecord] = {}
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._server: str | None = None
        self._broken = False
        self._accepted = False
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
        """Write the remaining changes, so that removed blocks do not stay, and let another writer take over at once."""
        if pod.lease is None:
            return
        try:
            if not pod.needs_resync and not pod.outbox.overflowed:
                await self._write_changes(pod, pod.lease)
            await self._commands.release(pod.lease)
        except Fenced:
            log.info("redis_handover_fenced", pod=name)

    # Changes of pods

    def add(self, model: str, pod: str, hashes: Sequence[int]) -> None:
        """Record that `pod` holds `hashes`."""
        self._record(pod).outbox.add(model, hashes)
        self._wake()

    def remove(self, model: str, pod: str, hashes: Sequence[int]) -> None:
        """Record that `pod` no longer holds `hashes`."""
        if pod in self._pods:
            self._pods[pod].outbox.remove(model, hashes)
            self._wake()

    def clear(self, pod: str) -> None:
        """Record that `pod` holds nothing."""
        if pod in self._pods:
            self._pods[pod].outbox.clear()
            self._wake()

    def forget(self, pod: str) -> None:
        """As `clear`, and then stop being the writer of `pod`, which has gone."""
        if pod in self._pods:
            self.clear(pod)
            self._pods[pod].leaving = True

    def follow(self, pod: str) -> None:
        """Become the writer of `pod`, even if there is nothing to write yet."""
        self._record(pod)
        self._wake()

    @property
    def pods(self) -> list[str]:
        """The pods that this process writes, or wants to write."""
        return list(self._pods)

    def needs_resync(self, pod: str) -> bool:
        """Whether the pod's blocks in Redis may differ from those that it holds, as far as this writer knows."""
        return pod not in self._pods or self._pods[pod].needs_resync or self._pods[pod].outbox.overflowed

    def is_writer(self, pod: str) -> bool:
        """Whether this writer has the lease on the pod."""
        return pod in self._pods and self._pods[pod].lease is not None

    def is_sure(self, endpoint: str, names: Iterable[str]) -> bool:
        """Whether this writer has the leases on `endpoint` and on those of its `names` that are written, all in step."""
        return all(
            self.is_writer(name) and not self.needs_resync(name)
            for name in names
            if name == endpoint or name in self._pods
        )

    @property
    def is_connected(self) -> bool:
        """Whether the server accepted everything in the last round of writing."""
        return self._accepted

    @property
    def waiting(self) -> int:
        """Number of blocks that wait to be written."""
        return sum(pod.outbox.waiting for pod in self._pods.values())

    def held(self, pod: str) -> Outbox | None:
        """The blocks that a pod holds, according to this writer; None if the pod is unknown."""
        return self._pods[pod].outbox if pod in self._pods else None

    async def flush(self) -> None:
        """Wait until everything that can be written is written. Raises `IndexUnavailable` if that takes too long."""
        try:
            async with asyncio.timeout(2 * RETRY_MAX_SECONDS):
                await self._idle.wait()
        except TimeoutError as error:
            raise IndexUnavailable(
                f"{self._store.config.where} did not accept all writes within {2 * RETRY_MAX_SECONDS:g} s"
            ) from error

    def _record(self, pod: str) -> PodRecord:
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
                self._broken, self._accepted = True, False
                for pod in self._pods.values():
                    pod.renew_at, pod.unconfirmed = float("-inf"), True
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX_SECONDS)
            except Exception:
                # Supervision boundary: after an unexpected error the next round resyncs all pods.
                log.exception("redis_writer_crashed")
                self._resync_all()
                await asyncio.sleep(RETRY_MAX_SECONDS)

    async def _round(self) -> None:
        """Write all changes, then wait for more or for the next tick."""
        await self._check_server()
        self._wanted.clear()
        for name, pod in list(self._pods.items()):
            await self._write_pod(name, pod)
        self._accepted = True
        if any(pod.has_work for pod in self._pods.values()):
            return
        self._idle.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(TICK_SECONDS):
                await self._wanted.wait()

    async def _check_server(self) -> None:
        """After failures and before renewals, resync all pods if the server process is another one: it may lack writes."""
        if not self._broken and not any(map(self._is_due, self._pods.values())):
            return
        server = await self._store.server_id()
        if (self._server is not None and server != self._server) or (server is None and self._broken):
            log.warning("redis_server_changed", server=self._store.config.where)
            self._resync_all()
        self._server = server
        if self._broken:
            log.info("redis_writes_resumed", server=self._store.config.where)
        self._broken = False

    def _resync_all(self) -> None:
        self._published_schemes.clear()
        for pod in self._pods.values():
            pod.lose_lease()

    async def _write_pod(self, name: str, pod: PodRecord) -> None:
        try:
            if not await self._may_write(name, pod):
                return
            if self._is_due(pod):
                await self._acquire(name, pod)
            if pod.lease is None:
                pod.outbox.drop()
                if pod.leaving:
                    del self._pods[name]
                return
            await self._bring_up_to_date(pod, pod.lease)
            if pod.leaving and not pod.outbox.waiting:
                await self._commands.release(pod.lease, gone=True)
                pod.lose_lease()
                if pod.leaving:  # the pod may have come back meanwhile
                    del self._pods[name]
        except Fenced:
            log.warning("redis_writer_fenced", pod=name)
            self.stats.fenced += 1
            pod.lose_lease()

    async def _may_write(self, name: str, pod: PodRecord) -> bool:
        """Whether to be the pod's writer: only once its content is known, and not for long after it becomes unknown."""
        if pod.leaving or self._is_known(name):
            pod.unknown_since = None
            return True
        now = self._clock()
        pod.unknown_since = now if pod.unknown_since is None else min(now, pod.unknown_since)
        if pod.lease is not None and now - pod.unknown_since <= self._lease_seconds:
            return True
        if pod.lease is not None:
            log.warning("redis_lease_released", pod=name, reason="it is not known what the pod holds")
            await self._commands.release(pod.lease)
            pod.lose_lease()
        pod.outbox.drop()
        return False

    def _is_due(self, pod: PodRecord) -> bool:
        """Whether to renew the lease: it is time, or the clock has gone back."""
        return not pod.renew_at - self._lease_seconds < self._clock() < pod.renew_at

    async def _acquire(self, name: str, pod: PodRecord) -> None:
        """Take or renew the lease; with a new token if the server may still execute a write with the old one."""
        now, new_token = self._clock(), pod.unconfirmed
        lease = await self._commands.acquire(
            name, self.name, now=now, lease_seconds=self._lease_seconds, new_token=new_token
        )
        if lease is None or pod.lease is None or lease.token != pod.lease.token + new_token:
            pod.lose_lease()
        pod.lease, pod.renew_at, pod.unconfirmed = lease, now + self._lease_seconds / 3, False

    async def _bring_up_to_date(self, pod: PodRecord, lease: Lease) -> None:
        if pod.outbox.overflowed:
            self.stats.overflows += 1
            pod.needs_resync = True
        if pod.needs_resync and pod.unknown_since is not None:
            pod.outbox.drop()
        elif pod.needs_resync:
            lease = await self._resync(pod, lease.pod)
        await self._write_changes(pod, lease)
        state = self._state_of(lease.pod)
        if state is not None and state != pod.published_state:
            await self._commands.publish_state(lease, state)
            pod.published_state = state
        await self._restamp(pod, lease)

    async def _resync(self, pod: PodRecord, name: str) -> Lease:
        """Write all blocks of the pod again, and then invalidate all other entries of the pod."""
        self.stats.resyncs += 1
        await self._acquire(name, pod)  # the new epoch must be above all stamps so far
        if (lease := pod.lease) is None:
            raise Fenced
        pod.outbox.drop()
        self._published_schemes.difference_update(pod.outbox.models)  # an operator may have purged them
        pod.min_stamp = lease.next_epoch
        for model, blocks in list(pod.outbox.held):
            for start in range(0, len(blocks), BATCH):
                await self._write(pod, lease, [Change(model, "+", blocks[start : start + BATCH])])
                await self._renew_due(lease)
        await self._commands.set_epoch(lease, pod.min_stamp, now=self._clock())
        pod.needs_resync = False
        pod.restamping, pod.restamp_at = iter(()), self._clock() + self._restamp_seconds
        return lease

    async def _write_changes(self, pod: PodRecord, lease: Lease) -> None:
        while (taken := pod.outbox.take(BATCH)) is not None:
            try:
                if isinstance(taken, Clear):
                    await self._commands.set_epoch(lease, 0, now=self._clock())
                else:
                    await self._write(pod, lease, taken)
            except IndexUnavailable:
                pod.outbox.put_back(taken)
                raise
            await self._renew_due(lease)

    async def _renew_due(self, lease: Lease) -> None:
        """Renew leases between batches, so that none expires during long writes. Raises `Fenced` if `lease` is lost."""
        for name, pod in list(self._pods.items()):
            if pod.lease is not None and self._is_due(pod):
                await self._acquire(name, pod)
        mine = self._pods.get(lease.pod)
        if mine is None or mine.lease is None or mine.lease.token != lease.token:
            raise Fenced

    async def _write(self, pod: PodRecord, lease: Lease, changes: Sequence[Change]) -> None:
        for model in {change.model for change in changes} - self._published_schemes:
            await self._commands.publish_scheme(model)
            self._published_schemes.add(model)
        await self._commands.write(lease, changes, now=self._clock(), min_stamp=pod.min_stamp)
        self.stats.batches += 1
        self.stats.blocks += sum(len(change.blocks) for change in changes)

    async def _restamp(self, pod: PodRecord, lease: Lease) -> None:
        """Renew the stamps of some blocks: nothing else rewrites blocks that are only hit, and they must not expire."""
        now = self._clock()
        if now >= pod.restamp_at:
            pod.restamp_at = now + self._restamp_seconds
            if self._store.is_cluster:
                pod.needs_resync = True  # a failover may have lost removals and epochs without any notice
                return
            pod.restamping = ((model, block) for model, blocks in list(pod.outbox.held) for block in blocks)
            pod.restamps_per_tick = max(BATCH, int(2 * len(pod.outbox) * TICK_SECONDS / self._restamp_seconds))
        left = pod.restamps_per_tick
        while left > 0 and (some := list(islice(pod.restamping, BATCH))):
            left -= len(some)
            by_model: dict[str, list[int]] = {}
            for model, block in some:
                if block in pod.outbox.blocks_of(model):
                    by_model.setdefault(model, []).append(block)
            if by_model:
                await self._write(pod, lease, [Change(model, "+", blocks) for model, blocks in by_model.items()])
                self.stats.restamped += sum(map(len, by_model.values()))
