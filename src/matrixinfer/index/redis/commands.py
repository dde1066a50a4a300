"""The commands that a writer sends for one pod. The server refuses them once another writer has taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import structlog

from matrixinfer.errors import IndexUnavailable, MatrixInferError
from matrixinfer.index.redis import layout, scripts
from matrixinfer.index.redis.outbox import Change
from matrixinfer.index.redis.store import Script, Store, is_wrong_type, unavailable

log = structlog.get_logger(__name__)

_FENCED = (layout.TOKENS, layout.EPOCHS, layout.STAMPS)


class Fenced(MatrixInferError):
    """Another writer has taken over this pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to be the writer of a pod, with a fencing token that rises with every new writer."""

    pod: str
    token: int
    next_epoch: int
    """The smallest epoch above all stamps at the time when the lease was taken or renewed."""


class Commands:
    """Sends commands. Each is one round trip, or two for `write` on Cluster.

    All raise `IndexUnavailable`; those that take a `Lease` also raise `Fenced`, except `release`. `meta` are the fields
    that describe how blocks are hashed (`index.scheme_of`). `now` is in Unix seconds.
    """

    def __init__(self, store: Store, meta: Mapping[str, str]) -> None:
        self._store = store
        self._meta = dict(meta)
        self._acquire = Script(scripts.ACQUIRE)
        self._state = Script(scripts.STATE)
        self._release = Script(scripts.RELEASE)
        self._epoch = Script(scripts.EPOCH)
        self._stamp = Script(scripts.STAMP)
        self._write = Script(scripts.WRITE)

    async def acquire(
        self, pod: str, writer: str, *, now: float, lease_seconds: float, new_token: bool = False
    ) -> Lease | None:
        """Take or renew the lease on a pod, with the next token if `new_token`. None while another writer is alive."""
        keys = (layout.TOKENS, layout.WRITERS, layout.LEASES, layout.EPOCHS, layout.STAMPS)
        answer = await self._store.run(self._acquire, keys, (pod, writer, now, lease_seconds, int(new_token)))
        return Lease(pod=pod, token=answer[0], next_epoch=answer[1]) if answer else None

    async def release(self, lease: Lease, *, gone: bool = False) -> None:
        """Let another writer take over at once. If the pod has `gone`, also delete its state."""
        keys = (layout.TOKENS, layout.LEASES, layout.STATES)
        await self._store.run(self._release, keys, (lease.pod, lease.token, int(gone)))

    async def publish_state(self, lease: Lease, state: str) -> None:
        """Publish the pod's state (`pod_states.encode`)."""
        if not await self._store.run(self._state, (layout.TOKENS, layout.STATES), (lease.pod, lease.token, state)):
            raise Fenced

    async def set_epoch(self, lease: Lease, epoch: int, *, now: float) -> None:
        """Invalidate the pod's entries with a stamp below `epoch`, or all its entries if `epoch` is 0."""
        if not await self._store.run(self._epoch, _FENCED, (lease.pod, lease.token, epoch, now)):
            raise Fenced

    async def write(self, lease: Lease, changes: Sequence[Change], *, now: float, min_stamp: int) -> None:
        """Add and remove blocks in order, with stamps of at least `min_stamp`."""
        args = (lease.pod, lease.token, now, min_stamp)
        if self._store.is_cluster:
            stamp = await self._store.run(self._stamp, _FENCED, args)
            if not stamp:
                raise Fenced
            await self._write_to_cluster(lease.pod, changes, stamp)
            return
        parts = ((layout.prefix_of(each.model), each.sign, " ".join(map(str, each.blocks))) for each in changes)
        if not await self._store.run(self._write, _FENCED, (*args, *chain.from_iterable(parts))):
            raise Fenced

    async def publish_scheme(self, model: str) -> None:
        """Publish how the model's blocks are hashed, so that readers with another scheme notice that they never match."""
        client: Any = self._store.client
        there = await self._store.table(layout.meta_key(model))
        found = {layout.text_of(name): value.decode("utf-8", "replace") for name, value in there.items()}
        if found and any(found.get(name) != value for name, value in self._meta.items()):
            log.warning("redis_scheme_replaced", model=model, was=found, now=self._meta)
        try:
            await self._store.ask(client.hset(layout.meta_key(model), mapping=self._meta))
        except IndexUnavailable as error:
            if not is_wrong_type(error.__cause__):
                raise
            self._store.unreadable(layout.meta_key(model))  # the blocks can be written all the same

    async def _write_to_cluster(self, pod: str, changes: Sequence[Change], stamp: int) -> None:
        """Write to the servers that have the blocks' slots."""
        pipeline: Any = self._store.client.pipeline(transaction=False)
        for change in changes:
            prefix = layout.prefix_of(change.model)
            for block in change.blocks:
                if change.sign == "+":
                    pipeline.hset(f"{prefix}{block}", pod, stamp)
                else:
                    pipeline.hdel(f"{prefix}{block}", pod)
        for failure in await self._store.ask(pipeline.execute(raise_on_error=False)):
            if isinstance(failure, Exception) and not is_wrong_type(failure):
                with unavailable():
                    raise failure
