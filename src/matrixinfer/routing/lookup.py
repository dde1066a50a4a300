"""What the pods hold of a prompt, as the index says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matrixinfer.blocks import BlockChain
from matrixinfer.index.base import BlockIndex
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.trust.cache_views import Caches, CacheView


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """Matches by publisher of KV events: a pod, or one of its data-parallel ranks."""

    blocks: Mapping[str, int]
    """Consecutive token blocks held from the start; publishers that hold none are absent."""
    tails: Mapping[str, int]
    """Tokens held beyond those blocks, where engine blocks straddle them; absent for none."""


class Held(NamedTuple):
    """What one endpoint holds of a prompt."""

    cache: CacheView | None
    blocks: int | None
    """Consecutive token blocks from the start; None when that is unknown."""
    tail: int
    """Tokens beyond those blocks."""
    tiers: Sequence[int]
    """How many of the blocks, from the start, are on the device; on the device or the host. None where all are."""


class Lookup:
    """Asks the index for a prompt's blocks and, where engine blocks straddle those, for the tail that decides."""

    def __init__(self, registry: PodRegistry, index: BlockIndex, caches: Caches) -> None:
        self._registry = registry
        self._index = index
        self._caches = caches

    async def match(self, model: str, requested: str, pods: Sequence[Pod], chain: BlockChain) -> Matches:
        """What each publisher holds of a prompt. Raises `IndexUnavailable`.

        Pods that name the model differently are each asked for under their own name of what the client `requested`.
        """
        if len({pod.base_model for pod in pods}) == 1:
            found = await self._index.match(model, chain)
            return Matches(blocks=found, tails=await self._tails(model, chain, found))
        matches: dict[str, int] = {}
        tails: dict[str, int] = {}
        names = {pod.name: pod.index_name(self._registry.name_at(pod.name, requested)) or model for pod in pods}
        for name in set(names.values()):
            publishers = {each.name for pod in pods if names[pod.name] == name for each in pod.endpoints}
            counts = await self._index.match(name, chain)
            found = {publisher: count for publisher, count in counts.items() if publisher in publishers}
            matches.update(found)
            tails.update(await self._tails(name, chain, found))
        return Matches(blocks=matches, tails=tails)

    async def _tails(self, model: str, chain: BlockChain, matches: Mapping[str, int]) -> Mapping[str, int]:
        """Where engine blocks straddle token blocks: how much of the one at the end of each match is held beyond it."""
        ends: dict[tuple[int, int], list[str]] = {}
        for name, count in matches.items():
            cache = self._caches.of(name)
            if cache is None or not cache.has_tails or cache.engine_block is None:
                continue
            tail = chain.tail(count, cache.engine_block)
            if tail is not None:
                ends.setdefault(tail, []).append(name)
        tails: dict[str, int] = {}
        for (tokens, block), names in ends.items():
            holders = await self._index.match(model, [block])
            tails.update((name, tokens) for name in names if name in holders)
        return tails

    def held(self, name: str, matches: Matches | None) -> Held:
        """What an endpoint's events and the index say of it."""
        cache = self._caches.of(name)
        if matches is None or cache is None or cache.trust == "none":
            return Held(cache, None, 0, ())
        blocks = matches.blocks
        match = blocks.get(name, 0)
        tiers = [min(match, blocks.get(tier, 0)) for tier in cache.tiers]  # they may have another writer
        return Held(cache, match, matches.tails.get(name, 0), tiers)
