"""What one answer proves: whether the predicted hit and our token ids were right.

An audit is opened when a request's endpoint is chosen, learns what happens to the request, and is closed with it. Its
findings go to `trust.drift` (does the index hold?) and `trust.parity` (do our token ids?).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial

from matrixinfer.blocks import BlockChain, TokenBlockProcessor, TokenIds
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.witness import Witness
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.prepare import Prepared
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.trust.drift import Drift
from matrixinfer.trust.drop import Drops
from matrixinfer.trust.parity import Comparison, Parity
from matrixinfer.trust.prediction import Prediction

_PREDICTS = (FeedState.COMPLETE, FeedState.PARTIAL)
"""Feed states in which the index is meant to be right."""


class Audit:
    """One request's findings. Both parts are None where they would prove nothing."""

    __slots__ = ("_comparison", "_prediction")

    def __init__(self, comparison: Comparison | None, prediction: Prediction | None) -> None:
        self._comparison = comparison
        self._prediction = prediction

    def moved(self) -> None:
        """The request goes to another endpoint, for which nothing was predicted."""
        self._end(computed=False)

    def first_byte(self) -> None:
        """The endpoint has computed the prompt."""
        if self._prediction is not None:
            self._prediction.first_byte()

    def usage(self, endpoint: str, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The answer of `endpoint` reports the prompt's tokens, and how many of them were cached if it says so."""
        if self._comparison is not None:
            self._comparison.counted(endpoint, prompt_tokens)
        if self._prediction is not None:
            self._prediction.reported(cached_tokens)

    def close(self, *, computed: bool) -> None:
        """The request is over; `computed` if its prompt was."""
        self._end(computed=computed)

    def _end(self, *, computed: bool) -> None:
        prediction, self._prediction = self._prediction, None
        try:
            if self._comparison is not None:
                self._comparison.unwatch(computed=computed)
        finally:
            if prediction is not None:
                prediction.end(computed=computed)


class Auditor:
    """Opens audits. `feeds` are the KV event feeds that this process follows, by endpoint."""

    def __init__(
        self,
        feeds: Mapping[str, PodFeed],
        parity: Parity,
        drift: Drift,
        lookup: Lookup,
        blocks: TokenBlockProcessor,
    ) -> None:
        self._feeds = feeds
        self._parity = parity
        self._drift = drift
        self._lookup = lookup
        self._blocks = blocks
        self._drops = Drops()

    def open(self, prepared: Prepared, chosen: Candidate) -> Audit:
        """Begin to audit a request that goes to `chosen`."""
        feed = self._feeds.get(chosen.name)
        prediction = None if feed is None else self._prediction(prepared, chosen, feed)
        try:
            return Audit(self._comparison(prepared, chosen, feed), prediction)
        except BaseException:
            if prediction is not None:
                prediction.end(computed=False)
            raise

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone."""
        self._drift.forget(endpoint)
        self._drops.forget(endpoint)

    def keep_models(self, models: Container[str]) -> None:
        """Forget models that are not among `models`."""
        self._parity.keep_models(models)

    def _comparison(self, prepared: Prepared, chosen: Candidate, feed: PodFeed | None) -> Comparison | None:
        """Compare our token ids with the engine's: its count of them always, the ids themselves in a sample."""
        if prepared.tokenizer is None or prepared.ids is None:
            return None
        comparison = Comparison(self._parity, prepared.tokenizer, prepared.prompt, len(prepared.ids))
        if feed is not None and (self._parity.is_watched(feed) or self._parity.is_due()):
            witness = self._witness(prepared, prepared.ids, chosen, feed)
            if witness is not None:
                comparison.watch(chosen.name, feed, witness)
        return comparison

    def _witness(self, prepared: Prepared, ids: TokenIds, chosen: Candidate, feed: PodFeed) -> Witness | None:
        """A witness of the blocks that the prompt brings to `chosen`; None when those cannot be distinguished from others."""
        request, size = prepared.request, feed.ledger.block_size
        if size is None or prepared.prompt.cache_salt or self._blocks.scheme != "prefix":
            return None
        _, match, tail, _ = self._lookup.match_at(chosen.name, prepared.matches)
        if match is None or chosen.pending_blocks or feed.state is not FeedState.COMPLETE:
            return None
        held = max(0, min(match * request.block_size + tail, len(ids) - 1)) // size * size
        if held + size > len(ids):
            return None  # the prompt brings no whole engine block
        return Witness(_model_at(feed, prepared), ids, request.chain, held=held, block_size=request.block_size)

    def _prediction(self, prepared: Prepared, chosen: Candidate, feed: PodFeed) -> Prediction | None:
        """Predict the hit where the index can and the answer may report it."""
        request, ledger = prepared.request, feed.ledger
        size, tokens, match = chosen.engine_block, request.prompt_tokens, chosen.matched_blocks
        if size is None or match is None or not tokens or feed.state not in _PREDICTS:
            return None
        if not prepared.prompt.reads_cache or (prepared.prompt.cache_salt and ledger.hides_salts):
            return None
        block, rule, chain = request.block_size, ledger.reusable.rule, request.chain
        if rule is None:
            # Engine blocks beyond the last whole token block can be evicted without any token block going, so the
            # prediction stops before them.
            held = min(match * block, tokens - 1) // size * size
            last = min(tokens // size * size // block, len(chain))  # token blocks that the prompt leaves behind
            stores = chain[last - 1] if last > match and not chosen.pending_blocks else None
            matched, covered, supports = chain[: -(-held // block)], block, ledger.supports
        else:
            # The prediction rests on one mark: that of the reusable prefix.
            held, stores, supports = match * block + chosen.matched_tail, None, ledger.reusable.supports
            matched = [chain.end(held + rule.drop, rule.ahead)] if held and isinstance(chain, BlockChain) else []
            covered = held
        return Prediction(
            self._drift,
            chosen.name,
            tokens=max(0, held - chosen.dropped_tokens),
            prompt_tokens=tokens,
            supports=supports,
            model=_model_at(feed, prepared),
            matched=matched,
            token_block=covered,
            stores=stores,
            explains=partial(self._explains, chosen.name, ledger),
        ).open()

    def _explains(self, endpoint: str, ledger: Ledger, predicted: int, cached: int) -> bool:
        return self._drops.explains(endpoint, ledger, predicted=predicted, cached=cached)


def _model_at(feed: PodFeed, prepared: Prepared) -> str:
    """The index's name of the request's model at one pod, whose engine may name it differently."""
    return feed.ledger.model if prepared.request.model == prepared.base_model else prepared.request.model
