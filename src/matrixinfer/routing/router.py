"""The decision path: a request body in, a pod out.

    body ─> prompt ─> token ids ─> blocks ─> index ─> scheduler ─> Route

Everything that awaits comes before the scheduler; from the candidates' snapshot to the charge for the chosen pod nothing
does, so that the next request sees this one. Whatever is missing on the way (token ids, the index, engine metrics)
degrades the decision and is noted in it; it never fails the request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matrixinfer.blocks import TokenBlockProcessor, TokenIds
from matrixinfer.config import SchedulerConfig
from matrixinfer.errors import IndexUnavailable, TokenizeError
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.witness import Witness
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.routing.candidates import Fleet
from matrixinfer.routing.decision_log import DecisionLog, record
from matrixinfer.routing.in_flight import Route
from matrixinfer.routing.lookup import Lookup, Matches
from matrixinfer.scheduler.framework import Candidate, Decision, SchedulingRequest
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.trust.cache_views import Caches, CacheView, FeedCaches
from matrixinfer.trust.drift import Drift, Prediction
from matrixinfer.trust.parity import Comparison, Parity


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """Everything that had to be awaited for one request."""

    prompt: Prompt
    request: SchedulingRequest
    pods: Sequence[Pod]
    matches: Matches | None
    """What the pods hold of it; None when the index was not asked or could not say."""
    base: str
    """The model that the engines run below it."""
    tokenizer: str | None
    """The model whose tokenizer made the ids, where they can be compared with the engine's."""
    ids: TokenIds | None
    approximate: bool
    """The ids have lately differed from the engine's: what the index says of them means nothing."""
    degraded: Mapping[str, str]
    """What the decision has to do without, and why."""
    timings_ms: dict[str, float]


_TELLING = (FeedState.COMPLETE, FeedState.PARTIAL)
"""In these states what is indexed is meant to be true."""


class Router:
    """Decides where requests go, and keeps account of those that are under way.

    `feeds` maps endpoints (a pod, or each of its data-parallel ranks) to their KV event feeds: of one without a feed the
    index knows nothing, unless `caches` does, which tells of the caches that others follow. `peers` is what
    other gateways have in flight. With `remembers` what was sent is kept of every endpoint, as the index may be lost.
    """

    def __init__(
        self,
        *,
        registry: PodRegistry,
        tokenizers: TokenizerManager,
        blocks: TokenBlockProcessor,
        index: BlockIndex,
        feeds: Mapping[str, PodFeed],
        scheduler: Scheduler,
        load: LoadLedger,
        metrics: Metrics,
        parity: Parity,
        drift: Drift,
        history: RoutingHistory,
        config: SchedulerConfig,
        caches: Caches | None = None,
        peers: PeerLoads | None = None,
        injects_usage: bool = False,
        remembers: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = registry
        self._tokenizers = tokenizers
        self._blocks = blocks
        self._feeds = feeds
        self._caches = caches or FeedCaches(feeds, drift.doubts)
        self._lookup = Lookup(registry, index, self._caches)
        self._scheduler = scheduler
        self._load = load
        self._metrics = metrics
        self.parity = parity
        self._drift = drift
        self._injects_usage = injects_usage
        self._remembers = remembers
        self._history = history
        self.decisions = DecisionLog(config.decisions_kept)
        self.fleet = Fleet(
            registry=registry,
            lookup=self._lookup,
            load=load,
            history=history,
            drift=drift,
            parity=parity,
            metrics=metrics,
            weights=config.weights,
            peers=peers or PeerLoads(),
        )
        self._max_blocks = max(1, config.max_prefix_tokens // blocks.block_size)
        self._clock = clock

    async def route(self, path: str, body: bytes, *, request_id: str, session: str | None = None) -> Route:
        """Choose a pod and charge it. Raises `RequestError` or `RoutingError`."""
        started = self._clock()
        prepared = await self._prepare(path, body, request_id, session)
        decision = self._scheduler.schedule(prepared.request, self._candidates(prepared))
        kept = record(decision, path, list(prepared.degraded.values()), prepared.timings_ms)
        self.decisions.add(kept)
        route = Route(
            decision,
            prepared.prompt,
            body,
            registry=self.registry,
            charge=partial(self._charge, prepared.request),
            history=self._history,
            record=kept,
            comparison=self._comparison(prepared, decision.chosen),
            prediction=self._prediction(prepared, decision.chosen),
            finished=self.fleet.finished,
            remembers=self._remembers,
            injects_usage=self._injects_usage,
        )
        self._observe(prepared, decision, self._clock() - started)
        return route

    async def explain(self, path: str, body: bytes) -> dict[str, object]:
        """What `route` would decide now, as JSON-able data; changes nothing. Raises as `route` does."""
        prepared = await self._prepare(path, body, "dry-run", None)
        started = self._clock()
        decision = self._scheduler.schedule(prepared.request, self._candidates(prepared), dry_run=True)
        prepared.timings_ms["schedule"] = (self._clock() - started) * 1000
        notes = list(prepared.degraded.values())
        return record(decision, path, notes, prepared.timings_ms, pods=None).view()

    def feeds_of(self, pod: Pod) -> dict[str, dict[str, object]]:
        """State of the KV events of each publisher of a pod, as JSON-able data; empty where nobody follows them."""
        return {
            endpoint.name: self._told(endpoint.name, cache)
            for endpoint in pod.endpoints
            if (cache := self._caches.of(endpoint.name)) is not None
        }

    def _told(self, name: str, cache: CacheView) -> dict[str, object]:
        feed = self._feeds.get(name)
        told: dict[str, object] = {
            "state": cache.feed,
            "trust": cache.trust,
            "hides_salts": cache.hides_salts,
            "engine_block_size": cache.engine_block,
        }
        if feed is not None:
            told |= {"untrusted": feed.untrusted, "frames": feed.stats.frames, "engine_blocks": len(feed.ledger)}
        return told

    async def _prepare(self, path: str, body: bytes, request_id: str, session: str | None) -> _Prepared:
        timings: dict[str, float] = {}
        degraded: dict[str, str] = {}
        began = self._clock()
        prompt = await self._tokenizers.read(path, body)
        model, pods = self.registry.resolve(prompt.model)
        timings["parse"] = (self._clock() - began) * 1000

        ids: TokenIds | None = None
        base = _base_of(model, pods)
        configured = self.registry.configured_name(base, pods)
        tokenizer: str | None = None
        chain: Sequence[int] = ()
        matches: Matches | None = None
        try:
            tokenized = await self._tokenizers.tokenize(prompt, model=configured, engines=pods)
        except TokenizeError as error:
            degraded["tokenize"] = f"not tokenized: {error}"
        else:
            ids = tokenized.tokens.ids
            timings.update(tokenized.tokens.timings_ms)
            if not tokenized.tokens.complete:
                degraded["media"] = f"only the {len(ids)} tokens before the first image, audio or video are known"
            elif tokenized.source != "request":
                tokenizer = configured
                if self.parity.is_approximate(configured):
                    degraded["parity"] = "token ids have differed from the engine's; only what was sent here counts"
            began = self._clock()
            chain = self._blocks.chain(
                ids,
                salt=prompt.cache_salt,
                max_blocks=self._max_blocks,
                hashes=None if prompt.cache_salt else tokenized.tokens.hashes,
            )
            try:
                # A pod that computes the prompt whatever it holds is as good as one that holds nothing.
                if prompt.reads_cache:
                    matches = await self._lookup.match(model, prompt.model, pods, chain)
            except IndexUnavailable as error:
                degraded["index"] = f"index unavailable: {error}"
            timings["match"] = (self._clock() - began) * 1000
        request = SchedulingRequest(
            id=request_id,
            model=model,
            prompt_tokens=None if ids is None else len(ids),
            block_size=self._blocks.block_size,
            chain=chain,
            prefix=prompt.prefix,
            session=session,
            now=self._clock(),
        )
        return _Prepared(
            prompt=prompt,
            request=request,
            pods=pods,
            matches=matches,
            base=base,
            tokenizer=tokenizer,
            ids=ids,
            approximate="parity" in degraded,
            degraded=degraded,
            timings_ms=timings,
        )

    def _candidates(self, prepared: _Prepared) -> list[Candidate]:
        return self.fleet.candidates(
            prepared.request,
            prepared.pods,
            prepared.matches,
            reads_cache=prepared.prompt.reads_cache,
            approximate=prepared.approximate or "index" in prepared.degraded,
        )

    def _charge(self, request: SchedulingRequest, pod: Candidate) -> Charge:
        """Count the request at a pod, with the blocks that it will bring there."""
        return self._load.charge(
            pod.name,
            request.model,
            hashes=request.chain,
            start=pod.matched_blocks or 0,
            queued_tokens=(request.prompt_tokens or 0) - pod.predicted_hit(request.prompt_tokens, request.block_size),
        )

    def _comparison(self, prepared: _Prepared, chosen: Candidate) -> Comparison | None:
        """Of the prompt's tokens with those of the engine, where they were made here or by another engine."""
        if prepared.tokenizer is None or prepared.ids is None:
            return None
        comparison = Comparison(self.parity, prepared.tokenizer, prepared.prompt, len(prepared.ids))
        feed = self._feeds.get(chosen.name)
        if feed is not None and (self.parity.is_watched(feed) or self.parity.is_due()):
            witness = self._witness(prepared, prepared.ids, chosen, feed)
            if witness is not None:
                comparison.watch(chosen.name, feed, witness)
        return comparison

    def _prediction(self, prepared: _Prepared, chosen: Candidate) -> Prediction | None:
        """Of what the chosen pod will find in its cache, where the index can tell and the answer may."""
        feed, size, request = self._feeds.get(chosen.name), chosen.engine_block, prepared.request
        tokens, match, block = request.prompt_tokens, chosen.matched_blocks, request.block_size
        if feed is None or size is None or match is None or not tokens or feed.state not in _TELLING:
            return None
        if not prepared.prompt.reads_cache or (prepared.prompt.cache_salt and feed.ledger.hides_salts):
            return None
        # What is held beyond whole token blocks can go without one of them being gone.
        foretold = min(match * block, tokens - 1) // size * size
        last = tokens // size * size // block  # token blocks that the prompt leaves behind
        return Prediction(
            self._drift,
            chosen.name,
            tokens=foretold,
            prompt_tokens=tokens,
            supports=feed.ledger.supports,
            model=self._name_at(feed, prepared),
            held=request.chain[: -(-foretold // block)],
            token_block=block,
            stored=request.chain[last - 1] if last > match and not chosen.pending_blocks else None,
            purges=not feed.ledger.is_hybrid,
        )

    def _name_at(self, feed: PodFeed, prepared: _Prepared) -> str:
        """What the index calls the model of a request at one pod, whose engine may name it differently."""
        return feed.ledger.model if prepared.request.model == prepared.base else prepared.request.model

    def _witness(self, prepared: _Prepared, ids: TokenIds, chosen: Candidate, feed: PodFeed) -> Witness | None:
        """Of the blocks that the prompt is expected to bring to the chosen pod; None where they cannot be told."""
        request, size = prepared.request, feed.ledger.block_size
        if size is None or prepared.prompt.cache_salt or self._blocks.scheme != "prefix":
            return None
        _, match, tail, _ = self._lookup.held(chosen.name, prepared.matches)
        if match is None or chosen.pending_blocks or feed.state is not FeedState.COMPLETE:
            return None
        held = max(0, min(match * request.block_size + tail, len(ids) - 1)) // size * size
        if held + size > len(ids):
            return None  # no whole block of the prompt is new
        return Witness(self._name_at(feed, prepared), ids, request.chain, held=held, block_size=request.block_size)

    def _observe(self, prepared: _Prepared, decision: Decision, seconds: float) -> None:
        request = prepared.request
        self._metrics.decided(decision.chosen.name, seconds, prepared.timings_ms)
        for reason in prepared.degraded:
            self._metrics.degraded(reason)
        if request.prompt_tokens is not None:
            self._metrics.predicted(
                request.prompt_tokens, decision.chosen.predicted_hit(request.prompt_tokens, request.block_size)
            )


def _base_of(model: str, pods: Sequence[Pod]) -> str:
    """An adapter is tokenized as the model below it."""
    served = pods[0].served
    return served.base_model if served is not None and model in served.adapters else model
