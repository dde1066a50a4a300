"""Scans all blocks in Redis page by page: for warm starts, operators and the reclaimer, but never for a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matrixinfer.index.redis import layout
from matrixinfer.index.redis.store import Store, unavailable

PAGE = 500
"""Number of keys that the server looks at per page."""


class Block(NamedTuple):
    """One block and its holders."""

    key: bytes
    model: str
    hash: int
    stamps: Mapping[str, int]
    """Stamps by canonical pod name (`layout.named`)."""


async def pages(
    store: Store, *, model: str | None = None, keys_per_second: float | None = None
) -> AsyncIterator[list[Block]]:
    """Yield all blocks of one model, or of all models. A block may come twice. Raises `IndexUnavailable`."""
    async for keys in key_pages(store, model=model, keys_per_second=keys_per_second):
        if keys:
            yield await fetch(store, keys)


async def key_pages(
    store: Store, *, model: str | None = None, keys_per_second: float | None = None
) -> AsyncIterator[list[bytes]]:
    """As `pages`, but yield only keys, and also empty pages: the server looks at `PAGE` keys for each."""
    pattern = f"{layout.BLOCKS}{'*' if model is None else _escaped(model) + '@*'}"
    await store.ready()
    for node in _nodes(store):
        cursor = 0
        while True:
            began = time.monotonic()
            cursor, keys = await store.ask(_scan(store, node, cursor, pattern))
            yield keys
            if cursor == 0:
                break
            if keys_per_second is not None:
                await asyncio.sleep(max(0.0, PAGE / keys_per_second - (time.monotonic() - began)))


async def size(store: Store) -> int:
    """Number of keys of any kind in the database. Raises `IndexUnavailable`."""
    client: Any = store.client
    return int(await store.ask(client.dbsize()))


async def floors(store: Store, *, max_age: float, clock: Callable[[], float] = time.time) -> layout.Floors:
    """Which entries count. Raises `IndexUnavailable`."""
    epochs, leases = await store.table(layout.EPOCHS), await store.table(layout.LEASES)
    return layout.floors(epochs, leases, now=clock(), max_age=max_age)


async def fetch(store: Store, keys: Sequence[bytes]) -> list[Block]:
    """Read the blocks with these keys; keys of other kinds are left out. Raises `IndexUnavailable`."""
    with unavailable():
        pipeline: Any = store.client.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(key)
        answers = await store.ask(pipeline.execute(raise_on_error=False))
    found = []
    for key, entries in zip(keys, answers, strict=True):
        name = layout.block_of(key.decode("utf-8", "replace"))
        if name is not None and isinstance(entries, dict):
            found.append(Block(key, *name, layout.named(entries)))
    return found


def _nodes(store: Store) -> list[Any]:
    client: Any = store.client
    return client.get_primaries() if store.is_cluster else [None]


async def _scan(store: Store, node: Any, cursor: int, pattern: str) -> tuple[int, list[bytes]]:
    client: Any = store.client
    if node is None:
        found = await client.scan(cursor, match=pattern, count=PAGE)
        return int(found[0]), found[1]
    cursors, keys = await client.scan(cursor, match=pattern, count=PAGE, target_nodes=node)
    return int(next(iter(cursors.values()))), keys


def _escaped(text: str) -> str:
    """Escape `text` for a pattern of SCAN."""
    return "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in text)
