"""How many blocks of a prompt each endpoint holds, according to the index."""

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
    """Matches by endpoint name."""

    blocks: Mapping[str, int]
    """Matched token blocks, consecutive from the prompt's start. Endpoints that hold none are absent."""
    tails: Mapping[str, int]
    """Tokens held beyond those blocks, where engine blocks straddle them. Endpoints that hold none are absent."""


class Held(NamedTuple):
    """What one endpoint holds of a prompt."""

    cache: CacheView | None
    """What is known of its cache; None when nobody follows its events."""
    blocks: int | None
    """Matched token blocks; None when the index cannot say."""
    tail: int
    """Tokens held beyond those blocks."""
    tiers: Sequence[int]
    """How many of the blocks, from the start, are on the device; on the device or the host. Empty when all are."""


class Lookup:
    """Asks the index for a prompt's blocks and, where engine blocks straddle token blocks, for the tail behind them."""

    def __init__(self, registry: PodRegistry, index: BlockIndex, caches: Caches) -> None:
        self._registry = registry
        self._index = index
        self._caches = caches

    async def match(self, model: str, requested: str, pods: Sequence[Pod], chain: BlockChain) -> Matches:
        """Match a prompt's `chain` at the endpoints of `pods`. Raises `IndexUnavailable`.

        Pods may name one model differently: each is looked up under its own name of the model that the client
        `requested`.
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
        """Where engine blocks straddle token blocks: how many tokens behind each match its last engine block holds."""
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

    def held(self, endpoint: str, matches: Matches | None) -> Held:
        """What `endpoint` holds now. `matches` is None when the index was not asked or could not answer."""
        cache = self._caches.of(endpoint)
        if matches is None or cache is None or cache.trust == "none":
            return Held(cache, None, 0, ())
        blocks = matches.blocks
        match = blocks.get(endpoint, 0)
        tiers = [min(match, blocks.get(tier, 0)) for tier in cache.tiers]  # another process may write them
        return Held(cache, match, matches.tails.get(endpoint, 0), tiers)
