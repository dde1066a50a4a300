"""What a writer has the server do for one pod, each step refused where another writer has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import structlog

from matrixinfer.index.redis import layout, scripts
from matrixinfer.index.redis.outbox import Change
from matrixinfer.index.redis.store import Script, Store

log = structlog.get_logger(__name__)

_FENCED = (layout.TOKENS, layout.EPOCHS, layout.STAMPS)


class Fenced(Exception):
    """Another writer has come for this pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Being the writer of a pod."""

    pod: str
    token: int
    next_epoch: int
    """The least epoch above all that had been stamped when this was taken or renewed."""


class Commands:
    """Each call is one round trip, two where blocks are spread over a Cluster.

    All raise `IndexUnavailable`; those that take a `Lease` raise `Fenced`.
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

    async def acquire(self, pod: str, writer: str, *, now: float, lease: float, anew: bool = False) -> Lease | None:
        """Become the pod's writer for `lease` seconds, or stay it, `anew` with the next token; None while another one lives."""
        keys = (layout.TOKENS, layout.WRITERS, layout.LEASES, layout.EPOCHS, layout.STAMPS)
        answer = await self._store.run(self._acquire, keys, (pod, writer, now, lease, int(anew)))
        return Lease(pod=pod, token=answer[0], next_epoch=answer[1]) if answer else None

    async def release(self, hold: Lease, *, gone: bool = False) -> None:
        """Let the next writer come at once; nothing is told any more of a pod that is `gone`."""
        keys = (layout.TOKENS, layout.LEASES, layout.STATES)
        await self._store.run(self._release, keys, (hold.pod, hold.token, int(gone)))

    async def tell(self, hold: Lease, state: str) -> None:
        """Tell how far the pod's events are believed."""
        if not await self._store.run(self._state, (layout.TOKENS, layout.STATES), (hold.pod, hold.token, state)):
            raise Fenced

    async def set_epoch(self, hold: Lease, epoch: int, *, now: float) -> None:
        """Let nothing of the pod count that was stamped below `epoch`; nothing at all that is there with epoch 0."""
        if not await self._store.run(self._epoch, _FENCED, (hold.pod, hold.token, epoch, now)):
            raise Fenced

    async def write(self, hold: Lease, changes: Sequence[Change], *, now: float, least: int) -> None:
        """Add and remove blocks in order, with stamps of at least `least`."""
        who = (hold.pod, hold.token, now, least)
        if self._store.is_cluster:
            stamp = await self._store.run(self._stamp, _FENCED, who)
            if not stamp:
                raise Fenced
            await self._spread(hold.pod, changes, stamp)
            return
        parts = ((layout.prefix_of(each.model), each.sign, " ".join(map(str, each.blocks))) for each in changes)
        if not await self._store.run(self._write, _FENCED, (*who, *chain.from_iterable(parts))):
            raise Fenced

    async def tell_scheme(self, model: str) -> None:
        """Write how the model's blocks are made; whoever reads them otherwise would never match."""
        client: Any = self._store.client
        there = await self._store.ask(client.hgetall(layout.meta_key(model)))
        found = {layout.text_of(name): value.decode("utf-8", "replace") for name, value in there.items()}
        if found and any(found.get(name) != value for name, value in self._meta.items()):
            log.warning("redis_scheme_replaced", model=model, was=found, now=self._meta)
        await self._store.ask(client.hset(layout.meta_key(model), mapping=self._meta))

    async def _spread(self, pod: str, changes: Sequence[Change], stamp: int) -> None:
        """To the servers that have the blocks' slots."""
        pipeline: Any = self._store.client.pipeline(transaction=False)
        for change in changes:
            prefix = layout.prefix_of(change.model)
            for block in change.blocks:
                if change.sign == "+":
                    pipeline.hset(f"{prefix}{block}", pod, stamp)
                else:
                    pipeline.hdel(f"{prefix}{block}", pod)
        await self._store.ask(pipeline.execute())
