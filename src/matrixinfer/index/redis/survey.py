"""Summarizes the whole index for operators. Blocks are counted by a scan with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout, scan
from matrixinfer.index.redis.pod_states import PodState, decode
from matrixinfer.index.redis.store import Store

SAMPLE = 100
"""Number of blocks per model whose memory is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRow:
    """One pod according to the small tables; None for missing values."""

    writer: str | None
    alive: bool
    """Whether that writer's lease is valid."""
    lease_seconds: int | None
    """Seconds until its lease ends."""
    token: int | None
    epoch: int | None
    last_stamp: int | None
    state: PodState | None

    @property
    def is_ruled(self) -> bool:
        """Whether a writer of this project has written for it."""
        return self.epoch is not None or self.lease_seconds is not None


@dataclass(slots=True, kw_only=True)
class ModelRow:
    """The blocks of one model."""

    blocks: int = 0
    entries: int = 0
    """Number of entries that count, summed over pods."""
    stale: int = 0
    """Number of entries that do not count: their stamp is below the pod's epoch or cannot be read, or they are too old."""
    pods: dict[str, int] = field(default_factory=dict)
    """Number of entries that count, by pod."""
    ends: dict[str, int] = field(default_factory=dict)
    """Number of marks of reusable ends that count, by name. They are neither `blocks` nor `entries`."""
    scheme: dict[str, str] = field(default_factory=dict)
    """How the blocks are hashed, according to their writers."""
    bytes_per_block: float | None = None
    """Estimated from a sample; None if the server does not report it."""


@dataclass(slots=True, kw_only=True)
class Survey:
    """The result of a survey."""

    server: str
    keys: int
    """Number of keys of any kind in the database."""
    used_bytes: int | None
    looked_at: int = 0
    """Approximate number of keys looked at."""
    complete: bool = False
    """Whether the scan covered all keys."""
    models: dict[str, ModelRow] = field(default_factory=dict)
    pods: dict[str, PodRow] = field(default_factory=dict)

    def held(self, pod: str) -> int:
        """Number of entries of one pod, or of marks under a name of reusable ends, that count, over all models."""
        return sum(model.pods.get(pod, 0) + model.ends.get(pod, 0) for model in self.models.values())


async def survey(
    store: Store,
    *,
    max_age: float,
    limit: int,
    clock: Callable[[], float] = time.time,
    progress: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Scan about `limit` keys at most. A key that moves meanwhile may count twice. Raises `IndexUnavailable`.

    `max_age` is in seconds; `clock` returns Unix seconds; `progress` is called with the number of keys looked at.
    """
    name, used = await _server(store)
    found = Survey(server=name, keys=await scan.size(store), used_bytes=used)
    found.pods = await pods(store, clock=clock)
    floors = await scan.floors(store, max_age=max_age, clock=clock)
    samples: dict[str, list[bytes]] = {}
    async for keys in scan.key_pages(store):
        if found.looked_at >= limit:
            break
        found.looked_at = min(found.looked_at + scan.PAGE, max(found.keys, len(keys)))
        progress(found.looked_at)
        for block in await scan.fetch(store, keys) if keys else ():
            _count(found.models.setdefault(block.model, ModelRow()), block, floors)
            if len(sample := samples.setdefault(block.model, [])) < SAMPLE:
                sample.append(block.key)
    else:
        found.complete = True
    for model, row in found.models.items():
        meta = await store.table(layout.meta_key(model))
        row.scheme = {layout.text_of(name): value.decode("utf-8", "replace") for name, value in meta.items()}
        row.bytes_per_block = await _memory(store, samples[model])
    return found


async def pods(store: Store, *, clock: Callable[[], float] = time.time) -> dict[str, PodRow]:
    """All pods that appear in the small tables. Raises `IndexUnavailable`."""
    names = (layout.WRITERS, layout.LEASES, layout.TOKENS, layout.EPOCHS, layout.STAMPS, layout.STATES)
    tables = [await store.table(name) for name in names]
    writers, leases, tokens, epochs, stamps, states = tables
    now = clock()
    rows = {}
    for pod in sorted(set().union(*tables)):
        lease, state = layout.number(leases.get(pod)), states.get(pod)
        rows[layout.text_of(pod)] = PodRow(
            writer=writers[pod].decode("utf-8", "replace") if pod in writers else None,
            alive=lease is not None and lease >= now,
            lease_seconds=None if lease is None else round(lease - now),
            token=layout.number(tokens.get(pod)),
            epoch=layout.number(epochs.get(pod)),
            last_stamp=layout.number(stamps.get(pod)),
            state=None if state is None else decode(state),
        )
    return rows


def _count(row: ModelRow, block: scan.Block, floors: layout.Floors) -> None:
    is_end = bool(block.stamps) and all(pod.endswith(ENDS_SUFFIX) for pod in block.stamps)
    row.blocks += not is_end
    for pod, at in block.stamps.items():
        if not floors.counts(pod, at):
            row.stale += 1
        elif pod.endswith(ENDS_SUFFIX):
            row.ends[pod] = row.ends.get(pod, 0) + 1
        else:
            row.entries += 1
            row.pods[pod] = row.pods.get(pod, 0) + 1


async def _server(store: Store) -> tuple[str, int | None]:
    """The server's name and version, and its used memory (summed over a Cluster), if this user may ask for them."""
    try:
        info: Any = await store.ask(store.client.info())
    except IndexUnavailable as error:
        if isinstance(error.__cause__, RedisError):
            return store.config.where, None
        raise
    nodes = (
        list(info.values()) if store.is_cluster and all(isinstance(node, dict) for node in info.values()) else [info]
    )
    first = nodes[0]
    name = f"{first.get('server_name', 'redis')} {first.get('valkey_version', first.get('redis_version', ''))}"
    used = sum(int(node.get("used_memory", 0)) for node in nodes)
    return f"{name} at {store.config.where}", used


async def _memory(store: Store, keys: list[bytes]) -> float | None:
    pipeline: Any = store.client.pipeline(transaction=False)
    for key in keys:
        pipeline.memory_usage(key)
    sizes = [size for size in await store.ask(pipeline.execute(raise_on_error=False)) if isinstance(size, int)]
    return sum(sizes) / len(sizes) if sizes else None
