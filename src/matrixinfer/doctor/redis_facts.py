"""Gathers the facts about the shared index in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any

from redis.exceptions import NoPermissionError

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import Config, RedisConfig
from matrixinfer.doctor.facts import PodFacts, RedisFacts
from matrixinfer.doctor.redis_foreign import gather_foreign_facts
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout, match_script
from matrixinfer.index.redis.failures import failure_of
from matrixinfer.index.redis.index import scheme_of
from matrixinfer.index.redis.pod_states import PodState, PodStates
from matrixinfer.index.redis.store import Script, ScriptsRefused, Store
from matrixinfer.pods.registry import PodRegistry

_PINGS = 5


async def gather_redis_facts(
    config: Config,
    redis: RedisConfig,
    blocks: TokenBlockProcessor,
    registry: PodRegistry,
    pods: Sequence[PodFacts],
    patience: float,
) -> RedisFacts:
    """Ask the server, which gets `patience` seconds to answer. Writes nothing."""
    facts = RedisFacts(
        where=redis.where,
        is_index=config.index.kind == "redis",
        writer=config.index.writer,
        scheme=scheme_of(blocks),
        username=redis.username,
    )
    async with Store(redis) as store:
        try:
            async with asyncio.timeout(patience):
                facts = await _ask(store, facts, registry)
            if facts.is_index and facts.writer == "none":
                foreign = await gather_foreign_facts(store, config, blocks, registry, pods, patience)
                facts = replace(facts, foreign=foreign)
            return replace(facts, unreadable=sorted(store.unreadable_keys))
        except IndexUnavailable as error:
            return replace(facts, error=str(error), failure=failure_of(error))
        except TimeoutError:
            return replace(facts, error=f"no answer within {patience:g} seconds")


async def _ask(store: Store, facts: RedisFacts, registry: PodRegistry) -> RedisFacts:
    """Ask what lookups ask. What only the doctor asks may be refused."""
    client: Any = store.client
    times = []
    for _ in range(_PINGS):
        began = time.monotonic()
        await _permitted(store.ask(client.ping()))
        times.append(time.monotonic() - began)
    await store.table(layout.EPOCHS)
    await store.table(f"{layout.prefix_of('-')}0")
    states = PodStates(store, facts.scheme, models=registry.base_models, redis_name=registry.name_in_redis)
    await states.read()
    return replace(
        facts,
        slow=min(times) > store.config.deadline_seconds / 2,
        refuses_scripts=await _refuses_scripts(store),
        clock_ahead=await _clock_ahead(store),
        schemes=dict(states.foreign),
        endpoints_written=frozenset(pod for pod in states.pods if states.is_alive(pod) and _is_trusted(states.of(pod))),
    )


async def _permitted(answer: Awaitable[Any]) -> Any:
    """The answer; None if this user may not ask. Raises `IndexUnavailable` for any other error."""
    try:
        return await answer
    except IndexUnavailable as error:
        if isinstance(error.__cause__, NoPermissionError):
            return None
        raise


async def _clock_ahead(store: Store) -> float | None:
    if store.is_cluster:
        return None
    client: Any = store.client
    shown = await _permitted(store.ask(client.time()))
    return None if shown is None else shown[0] + shown[1] / 1e6 - time.time()


def _is_trusted(state: PodState | None) -> bool:
    return state is not None and state.trust in ("exact", "partial")


async def _refuses_scripts(store: Store) -> bool:
    if store.is_cluster or not store.config.scripts:
        return False
    args = (layout.prefix_of("-"), 0, 0, match_script.packed([0]), 0, 0, 0, 0)
    try:
        await store.run(Script(match_script.MATCH), (layout.EPOCHS, layout.LEASES), args)
    except ScriptsRefused:
        return True
    return False
