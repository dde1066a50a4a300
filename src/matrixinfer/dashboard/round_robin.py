"""What the engines' caches would have found, had requests gone to the pods in turn. An estimate. Pure.

For every model there is a turn, and for some of its endpoints a cache of the size of the engine's, that is filled with
the prompts of the requests whose turn it was to go there. Requests come to the endpoints in turn whatever they ask, so a
few endpoints stand for all of them. A cache holds hashes of prefixes, at a few places of each prompt, and drops those
first that were used longest ago. It takes no account of generated text, of adapters' own rules, or of pods that are down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matrixinfer.scheduler.framework import Candidate, Decision

ENDPOINTS = 2
"""Endpoints of each model whose caches are followed."""
MODELS = 32
UNKNOWN_TOKENS = 8_000_000
"""What a cache of unknown size holds."""
PREFIXES = 200_000
"""How many prefixes are remembered at most, in all caches together: about 20 MB."""
_STEPS = ((1_024, 128), (16_384, 512), (1 << 40, 4_096))
"""Up to how many tokens of a prompt which distance between two places is kept."""


class RoundRobin:
    """Estimates the hits of round robin."""

    def __init__(self) -> None:
        self.models: dict[str, _Turns] = {}
        self._caches = 0

    def hit(self, decision: Decision) -> int | None:
        """Prompt tokens that round robin would have found; None if this request's turn is not one that is followed."""
        request = decision.request
        if not request.prompt_tokens or not request.chain:
            return None
        turns = self.models.get(request.model)
        if turns is None:
            if len(self.models) >= MODELS:
                return None
            turns = self.models[request.model] = _Turns()
        endpoint = turns.next(decision.candidates)
        cache = turns.caches.get(endpoint.name)
        if cache is None:
            if len(turns.caches) >= ENDPOINTS:
                return None
            cache = turns.caches[endpoint.name] = _Cache()
            self._caches += 1
        hit = cache.take(request.chain, request.block_size, request.prompt_tokens)
        cache.shrink(endpoint.condition.cache_tokens or UNKNOWN_TOKENS, PREFIXES // self._caches)
        return hit

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone."""
        for model in [model for model, turns in self.models.items() if turns.caches.pop(endpoint, None) is not None]:
            self._caches -= 1
            if not self.models[model].caches:
                del self.models[model]

    def __len__(self) -> int:
        """Prefixes that are remembered."""
        return sum(len(cache.ends) for turns in self.models.values() for cache in turns.caches.values())


class _Turns:
    """Whose turn it is."""

    __slots__ = ("caches", "count")

    def __init__(self) -> None:
        self.count = 0
        self.caches: dict[str, _Cache] = {}

    def next(self, candidates: Sequence[Candidate]) -> Candidate:
        self.count += 1
        return candidates[self.count % len(candidates)]


class _Cache:
    """Prefixes by the hash of their last block, those first that were used longest ago."""

    __slots__ = ("ends", "tokens")

    def __init__(self) -> None:
        self.ends: dict[int, int] = {}
        """Hash to the tokens between the place before and this one."""
        self.tokens = 0

    def take(self, chain: Sequence[int], block_size: int, prompt_tokens: int) -> int:
        """Compute a prompt: how many of its tokens were there already."""
        places = list(_places(min(len(chain), prompt_tokens // block_size), block_size))
        ends, hit, is_held, before = self.ends, 0, True, 0
        taken: list[tuple[int, int]] = []
        for blocks in places:
            end, tokens = chain[blocks - 1], blocks * block_size
            width = ends.pop(end, None)
            is_held = is_held and width is not None
            if is_held and tokens < prompt_tokens:  # an engine computes the last token in any case
                hit = tokens
            taken.append((end, tokens - before))
            self.tokens += tokens - before - (width or 0)
            before = tokens
        for end, width in reversed(taken):  # the end of a prompt goes before its beginning
            ends[end] = width
        return hit

    def shrink(self, tokens: int, prefixes: int) -> None:
        """Drop what was used longest ago until no more than so many tokens and prefixes are left."""
        while self.ends and (self.tokens > tokens or len(self.ends) > prefixes):
            self.tokens -= self.ends.pop(next(iter(self.ends)))


def _places(blocks: int, block_size: int) -> Iterator[int]:
    """Numbers of blocks from a prompt's start after which its prefix is remembered: the same ones for every prompt."""
    place = 0
    for until, distance in _STEPS:
        step = max(1, distance // block_size)
        while place + step <= blocks and place * block_size < until:
            place += step
            yield place
