"""Gathers the facts about the shared index in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import Config, RedisConfig
from matrixinfer.doctor.facts import RedisFacts
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout, read_scripts
from matrixinfer.index.redis.index import scheme_of
from matrixinfer.index.redis.pod_states import PodState, PodStates
from matrixinfer.index.redis.store import Script, ScriptsRefused, Store

_PINGS = 5


async def gather_redis_facts(
    config: Config, redis: RedisConfig, blocks: TokenBlockProcessor, models: Sequence[str], patience: float
) -> RedisFacts:
    """Ask the server, which gets `patience` seconds to answer. Writes nothing."""
    facts = RedisFacts(
        where=redis.where, is_index=config.index.kind == "redis", writer=config.index.writer, scheme=scheme_of(blocks)
    )
    async with Store(redis) as store:
        try:
            async with asyncio.timeout(patience):
                return await _ask(store, facts, models)
        except IndexUnavailable as error:
            return replace(facts, error=str(error))
        except TimeoutError:
            return replace(facts, error=f"no answer within {patience:g} seconds")


async def _ask(store: Store, facts: RedisFacts, models: Sequence[str]) -> RedisFacts:
    client: Any = store.client
    times = []
    for _ in range(_PINGS):
        began = time.monotonic()
        await store.ask(client.hlen(layout.EPOCHS))
        times.append(time.monotonic() - began)
    seconds, microseconds = await store.ask(client.time()) if not store.is_cluster else divmod(time.time(), 1)
    ahead = seconds + microseconds / 1e6 - time.time() if not store.is_cluster else 0.0
    states = PodStates(store, facts.scheme, models=lambda: list(models))
    await states.read()
    return replace(
        facts,
        slow=min(times) > store.config.deadline_seconds / 2,
        refuses_scripts=await _refuses_scripts(store),
        clock_ahead=ahead,
        schemes=dict(states.foreign),
        endpoints_written=frozenset(pod for pod in states.pods if states.is_alive(pod) and _is_trusted(states.of(pod))),
    )


def _is_trusted(state: PodState | None) -> bool:
    return state is not None and state.trust in ("exact", "partial")


async def _refuses_scripts(store: Store) -> bool:
    if store.is_cluster or not store.config.scripts:
        return False
    try:
        await store.run(
            Script(read_scripts.MATCH), (layout.EPOCHS, layout.LEASES), (layout.prefix_of("-"), 0, 0, "0", 0, 0, 0)
        )
    except ScriptsRefused:
        return True
    return False
