"""What an endpoint's blocks count for in a decision, and what a request counts for at an endpoint: pure functions.

The library's `Selector` decides by them as the gateway does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from matrixinfer.blocks import BlockChain
from matrixinfer.config import WeightsConfig
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.index.ends import Question, Rule, search
from matrixinfer.scheduler.credit import cached_credit
from matrixinfer.scheduler.framework import Candidate, SchedulingRequest, Trust
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.trust.cache_views import Caches, CacheView

Search: TypeAlias = Generator[Question, Mapping[str, int], dict[str, int]]


class Matches(msgspec.Struct, frozen=True, kw_only=True):
    """Matches by publisher of KV events: a pod, or one of its data-parallel ranks."""

    blocks: Mapping[str, int]
    """Consecutive token blocks held from the start; publishers that hold none are absent."""
    tails: Mapping[str, int]
    """Tokens held beyond those blocks, where engine blocks straddle them; absent where there are none."""
    ends: Mapping[str, tuple[int, int]] = msgspec.field(default_factory=dict)
    """The longest reusable prefix of publishers that do not reuse all that they hold: token blocks, and tokens beyond
    them. Absent where there is none."""


class Match(NamedTuple):
    """How much of a prompt matches at one endpoint, according to its events and the index."""

    cache: CacheView | None
    blocks: int | None
    """Consecutive token blocks from the start; None when that is unknown."""
    tail: int
    """Tokens beyond those blocks."""
    tiers: Sequence[int]
    """How many of the blocks, from the start, are on the device; on the device or the host. Empty where all are."""


def match_at(name: str, cache: CacheView | None, matches: Matches | None) -> Match:
    """The match at one endpoint. `matches` is None when the index was not asked or could not answer."""
    if matches is None or cache is None or cache.trust == "none":
        return Match(cache, None, 0, ())
    if cache.rule is not None:
        return Match(cache, *matches.ends.get(name, (0, 0)), ())
    blocks = matches.blocks
    matched = blocks.get(name, 0)
    if cache.by_pod:
        matched = max(matched, blocks.get(EndpointName.parse(name).pod, 0))
    tiers = [min(matched, blocks.get(tier, 0)) for tier in cache.tiers]  # they may have another writer
    return Match(cache, matched, matches.tails.get(name, 0), tiers)


def searches(
    names: Iterable[str], chain: BlockChain, counts: Mapping[str, int], caches: Caches
) -> Iterator[tuple[Mapping[str, str], Search]]:
    """The searches for the reusable prefixes of endpoints that have a rule: one for all with the same.

    Each comes with the endpoints by the names of their ends. `counts` are the matches.
    """
    by_rule: dict[Rule, list[str]] = {}
    for name, rule in caches.rules_of(names).items():
        by_rule.setdefault(rule, []).append(name)
    for rule, ruled in by_rule.items():
        ends = {EndpointName.parse(name).ends: name for name in ruled}
        longest = max(counts.get(name, 0) for name in ruled)
        yield ends, search(ends.keys(), chain, rule, tokens=chain.tokens, blocks=longest)


def straddled(chain: BlockChain, counts: Mapping[str, int], caches: Caches) -> Mapping[tuple[int, int], Sequence[str]]:
    """Where engine blocks straddle token blocks: which tails the index must be asked for.

    Maps the tokens and the hash of each tail to the publishers whose match (`counts`) ends before it.
    """
    ends: dict[tuple[int, int], list[str]] = {}
    for name, count in counts.items():
        cache = caches.of(name)
        if cache is None or not cache.has_tails or cache.engine_block is None or cache.rule is not None:
            continue
        tail = chain.tail(count, cache.engine_block)
        if tail is not None:
            ends.setdefault(tail, []).append(name)
    return ends


def holdings(
    name: str,
    request: SchedulingRequest,
    match: Match,
    load: LoadLedger,
    history: RoutingHistory,
    weights: WeightsConfig,
    reads_cache: bool = True,
    approximate: bool = False,
) -> tuple[Trust, int, int, float | None, int, int]:
    """What an endpoint's blocks count for: its trust, its pending and recent blocks, and `Candidate.cached_credit`.

    The last two are what the prompt's bytes add: `Candidate.recent_chunks` and `guessed_tokens`.

    With `approximate` the index is not believed for this prompt. A prompt that does not read caches (`reads_cache`)
    gains nothing from pending or recent blocks. It has no keywords because it is called for every endpoint of every decision.
    """
    cache, matched, _, tiers = match
    trust: Trust = "none" if approximate or cache is None else cache.trust
    pending = recent = 0
    if reads_cache:
        whole = cache is not None and cache.rule is not None
        pending = load.pending(name, request.model, request.chain, matched or 0, whole_prompts=whole)
        recent = 0 if trust == "exact" else history.match(name, request.model, request.chain)
    chunks = guessed = 0
    if request.chunks and reads_cache:
        chunks = history.match_chunks(name, request.model, request.chunks)
        chunks += load.pending(name, request.model, request.chunks, chunks)
        guessed = _guessed(request, match, trust, max((matched or 0) + pending, recent), chunks)
    if trust == "exact" and not tiers and not guessed:
        return trust, pending, recent, None, chunks, 0
    if not (matched or recent or guessed):
        return trust, pending, 0, 0.0, chunks, 0
    credit = cached_credit(
        trust,
        weights,
        match=matched or 0,
        tiers=tiers,
        pending=pending,
        recent=recent,
        guessed=guessed / request.block_size,
    )
    return trust, pending, recent, credit, chunks, guessed


def _guessed(request: SchedulingRequest, match: Match, trust: Trust, held: int, chunks: int) -> int:
    """Estimated tokens that `chunks` chunks of the prompt's bytes add to the `held` blocks.

    Where the events say all that is cached, the bytes say nothing about tokens that are known: they count only beyond
    those, and only if all of those are held.
    """
    if not chunks:
        return 0
    sent = min(request.chunk_ends[chunks - 1], request.whole_tokens)
    if trust != "exact":
        return max(0, sent - held * request.block_size)
    known, cache = request.prompt_tokens or 0, match.cache
    if cache is not None and cache.rule is None:  # with a rule less is reused than is held
        engine_block = cache.engine_block or 1
        if held < min(len(request.chain), known // engine_block * engine_block // request.block_size):
            return 0  # not even the engine blocks before the first unknown token
    return max(0, sent - known)


def charge(load: LoadLedger, request: SchedulingRequest, candidate: Candidate) -> Charge:
    """Count a request at an endpoint, with the tokens it must compute and the blocks that it will bring there."""
    predicted = candidate.predicted_hit(request.prompt_tokens, request.block_size)
    return load.charge(
        candidate.name,
        request.model,
        hashes=request.chain,
        start=candidate.matched_blocks or 0,
        queued_tokens=max(0, request.whole_tokens - predicted - candidate.guessed_tokens) + request.other_tokens,
        prompt_tokens=request.whole_tokens,
        chunks=request.chunks,
        streams=request.streams,
    )
