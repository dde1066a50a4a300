"""Deletes data at an operator's request. Living writers notice within seconds and write their pods' blocks again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.index.redis import layout, scan, scripts
from matrixinfer.index.redis.store import Script, Store


def names_of(pod: str, known: Iterable[str]) -> list[str]:
    """The names under which the index may list a pod: its own, and those in `known` of its ranks, tiers and ends."""
    name = layout.canonical(pod)
    parsed = ((other, EndpointName.parse(other)) for other in known if other != name)
    return [name, *(other for other, parts in parsed if name in (parts.pod, parts.endpoint))]


async def purge_pod(store: Store, name: str, *, clock: Callable[[], float] = time.time) -> int:
    """Invalidate all entries written under a name until now. Returns the new epoch. Raises `IndexUnavailable`."""
    keys = (layout.TOKENS, layout.EPOCHS, layout.STAMPS)
    return int(await store.run(Script(scripts.PURGE), keys, (name, clock())))


async def purge_model(
    store: Store, model: str, *, dry_run: bool = False, progress: Callable[[int], None] = lambda _: None
) -> int:
    """Delete the keys of a model, or only count them with `dry_run`. Returns their number. Raises `IndexUnavailable`.

    `progress` is called with the number of keys looked at.
    """
    client: Any = store.client
    deleted = looked_at = 0
    async for keys in scan.key_pages(store, model=model):
        looked_at += scan.PAGE
        progress(looked_at)
        mine = [key for key in keys if (named := layout.block_of(key.decode("utf-8", "replace"))) and named[0] == model]
        if dry_run or not mine:
            deleted += len(mine)
            continue
        pipeline: Any = client.pipeline(transaction=False)
        for key in mine:  # one by one: on Cluster they are in different slots
            pipeline.execute_command("UNLINK", key)
        deleted += sum(await store.ask(pipeline.execute()))
    if not dry_run:
        await store.ask(client.unlink(layout.meta_key(model)))
    return deleted


async def take_tokens(store: Store, names: Iterable[str]) -> None:
    """Make the writers of these pods write all blocks again. Raises `IndexUnavailable`."""
    client: Any = store.client
    for name in names:
        await store.ask(client.hincrby(layout.TOKENS, name, 1))
