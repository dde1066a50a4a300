"""Gathers what writers of other projects have written into Redis, and whether lookups can match it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import aiohttp
import msgspec

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import Config, split_address
from matrixinfer.doctor.facts import ForeignFacts, PodFacts
from matrixinfer.errors import UNREADABLE, IndexUnavailable
from matrixinfer.index.redis import fit, scan
from matrixinfer.index.redis.store import Store
from matrixinfer.pods.registry import PodRegistry

WRITE_SECONDS = 3.0
"""How long a writer may take to write a prompt's blocks."""
SAMPLE_BLOCKS = 1_000
"""Blocks whose holders are looked at."""
_POLL_SECONDS = 0.2


class _Problem(msgspec.Struct):
    message: str
    fix: str


class _Report(msgspec.Struct):
    """The answer of `/debug/index`."""

    unmatched: list[_Problem] | None = None


async def gather_foreign_facts(
    store: Store,
    config: Config,
    blocks: TokenBlockProcessor,
    registry: PodRegistry,
    pods: Sequence[PodFacts],
    patience: float,
) -> ForeignFacts:
    """Look for the doctor's own prompts, ask a running gateway for its lookups, and compare the names of pods.

    Raises `IndexUnavailable`.
    """
    prompts = _prompts(pods, registry)
    fits, absent, mismatches = [], [], []
    for model, sent in prompts.items():
        found = await _find(store, model, sent, blocks, registry, min(WRITE_SECONDS, patience))
        why = fit.problem(found, blocks, registry.knows, sorted(pod.name for pod in registry.pods))
        if why is None:
            fits.append(model)
        elif found.found_as is not None or (found.scanned_all and not found.models.get(model)):
            mismatches.append(why)
        else:
            absent.append(model)
    if not mismatches:
        mismatches += await _gateway_says(config, patience)
    if not mismatches:
        mismatches += await _unknown_names(store, registry)
    up = {pod.name for pod in pods if pod.down is None}
    return ForeignFacts(
        probed=bool(prompts),
        fits=fits,
        mismatches=mismatches,
        absent=absent,
        without_start=sorted(up - registry.starts().keys()),
    )


def _prompts(pods: Sequence[PodFacts], registry: PodRegistry) -> Mapping[str, list[bytes]]:
    """The probes that engines computed, by the model's name in Redis."""
    prompts: dict[str, list[bytes]] = {}
    for pod in pods:
        if pod.served is not None:
            sent = [probe.prompt for probe in pod.probes if probe.prompt]
            if sent:
                prompts.setdefault(registry.name_in_redis(pod.served.base_model), []).extend(sent)
    return prompts


async def _find(
    store: Store, model: str, prompts: Sequence[bytes], blocks: TokenBlockProcessor, registry: PodRegistry, wait: float
) -> fit.Fit:
    """Look for prompts that were sent just now, until they are there or `wait` seconds are over."""
    deadline = time.monotonic() + wait
    while True:
        found = await fit.find(store, model, prompts, blocks, registry.block_sizes())
        if found.found_as is not None or time.monotonic() >= deadline:
            return found
        await asyncio.sleep(_POLL_SECONDS)


async def _gateway_says(config: Config, patience: float) -> list[tuple[str, str]]:
    """What the gateway with this config says about its lookups, if one runs and can be reached from here."""
    if config.admin is None:
        return []
    host, port = split_address(config.admin, path="$.admin")
    if host in ("0.0.0.0", "::"):  # noqa: S104 - every address of this host, so this one as well
        host = "127.0.0.1"
    url = f"http://[{host}]:{port}/debug/index" if ":" in host else f"http://{host}:{port}/debug/index"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=patience)) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            report = msgspec.json.decode(await answer.read(), type=_Report)
    except (aiohttp.ClientError, OSError, TimeoutError, *UNREADABLE):
        return []
    return [(problem.message, problem.fix) for problem in report.unmatched or ()]


async def _unknown_names(store: Store, registry: PodRegistry) -> list[tuple[str, str]]:
    """A problem if none of the holders of a sample of blocks is a pod of this config."""
    holders: set[str] = set()
    looked_at = 0
    models = {registry.name_in_redis(model) for model in registry.base_models()}
    try:
        async for page in scan.pages(store):
            holders.update(name for block in page if not models or block.model in models for name in block.stamps)
            looked_at += len(page)
            if looked_at >= SAMPLE_BLOCKS or any(map(registry.knows, holders)):
                break
    except IndexUnavailable:
        return []
    why = fit.unknown_names(sorted(holders), registry.knows, sorted(pod.name for pod in registry.pods))
    return [] if why is None else [why]
