"""What one answer proves: whether the predicted hit and our token ids were right.

An audit is opened when a request's endpoint is chosen, learns what happens to the request, and is closed with it. Its
findings go to `trust.drift` (does the index hold?) and `trust.parity` (do our token ids?).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import partial

import msgspec

from matrixinfer.blocks import BlockChain, TokenBlockProcessor, TokenIds
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.states import SETTLED
from matrixinfer.kvevents.witness import Witness
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.prepared import Prepared
from matrixinfer.routing.sizing import Sizer
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.trust.drift import Drift
from matrixinfer.trust.drop import Drops
from matrixinfer.trust.media import MediaNames, Watched
from matrixinfer.trust.parity import Comparison, Parity
from matrixinfer.trust.prediction import Prediction, Unwatched
from matrixinfer.trust.sampling import Present, Sampling

"""Feed states in which the index is meant to be right."""


class Audit:
    """One request's findings. The parts are None where they would prove nothing.

    `learn` takes the prompt's tokens as an answer counts them. `late` makes the parts when the token ids come after the
    decision.
    """

    __slots__ = ("_comparison", "_late", "_learn", "_prediction", "_present", "_reported", "_sampling", "_watched")

    def __init__(
        self,
        comparison: Comparison | None,
        prediction: Prediction | Unwatched | None,
        sampling: Sampling,
        present: Present | None,
        *,
        learn: Callable[[int], None],
        late: LateAudit | None = None,
        watched: tuple[MediaNames, Watched] | None = None,
    ) -> None:
        self._comparison = comparison
        self._prediction = prediction
        self._sampling = sampling
        self._present = present
        self._learn = learn
        self._late = late
        self._watched = watched
        self._reported: tuple[str, int] | None = None

    def learned(self, prepared: Prepared, here: Candidate | None) -> bool:
        """The token ids have come; `here` is the endpoint as known now. Returns whether a hit is predicted there.

        It is not if the endpoint has published anything since the request was sent: that may be this prompt's blocks.
        """
        late, self._late = self._late, None
        if late is None:
            return False
        if self._present is not None:
            self._present.ids = prepared.ids
        self._comparison = late.comparison(prepared)
        if self._comparison is not None and self._reported is not None:
            self._comparison.counted(*self._reported)
        self._prediction = None if here is None else late.prediction(prepared, here)
        return self._prediction is not None

    @property
    def is_sampled(self) -> bool:
        """Whether its token ids are being looked for in the endpoint's events."""
        return self._comparison is not None and self._comparison.is_sampled

    def sends_ids(self) -> None:
        """The endpoint gets the token ids from us, so that its count of them proves nothing. Not for sampled requests."""
        self._comparison = None

    def moved(self) -> None:
        """The request goes to another endpoint, for which nothing was predicted."""
        self._end(computed=False)

    def first_byte(self) -> None:
        """The endpoint has computed the prompt."""
        self._predict_no_more()
        if self._prediction is not None:
            self._prediction.first_byte()

    def usage(self, endpoint: str, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The answer of `endpoint` reports the prompt's tokens, and how many of them were cached if it says so."""
        self._learn(prompt_tokens)
        self._reported = endpoint, prompt_tokens
        if self._watched is not None:
            self._watched[1].reported(prompt_tokens, cached_tokens)
        if self._comparison is not None:
            self._comparison.counted(endpoint, prompt_tokens)
        if self._prediction is not None:
            self._prediction.reported(cached_tokens)

    def close(self, *, computed: bool) -> None:
        """The request is over; `computed` if its prompt was."""
        self._end(computed=computed)

    def _predict_no_more(self) -> None:
        if self._late is not None:
            self._late.feed = None

    def _end(self, *, computed: bool) -> None:
        self._predict_no_more()
        watched, self._watched = self._watched, None
        if watched is not None:
            watched[0].close(watched[1])
        prediction, self._prediction = self._prediction, None
        present, self._present = self._present, None
        try:
            if present is not None:
                self._sampling.leave(present)
            if self._comparison is not None:
                self._comparison.unwatch(computed=computed)
        finally:
            if prediction is not None:
                prediction.end(computed=computed)


class LateAudit:
    """What is needed to audit a request whose token ids come after it was sent to an endpoint."""

    __slots__ = ("_auditor", "_mark", "feed")

    def __init__(self, auditor: Auditor, feed: PodFeed | None) -> None:
        self._auditor = auditor
        self.feed = feed
        """The endpoint's feed; None once nothing can be predicted any more."""
        self._mark = _mark(feed)

    def comparison(self, prepared: Prepared) -> Comparison | None:
        """Compares the count of the prompt's tokens."""
        return self._auditor.comparison(prepared)

    def prediction(self, prepared: Prepared, chosen: Candidate) -> Prediction | None:
        """Predicts the hit, if the index still is as it was when the request was sent."""
        if self.feed is None or _mark(self.feed) != self._mark:
            return None
        return self._auditor.prediction(prepared, chosen, self.feed)


def _mark(feed: PodFeed | None) -> tuple[int, int] | None:
    """Changes whenever the feed changes the index."""
    return None if feed is None else (feed.epoch, feed.stats.frames)


def _losses(feed: PodFeed) -> tuple[int, ...]:
    """Changes whenever an event that the engine published may not have been applied."""
    stats = feed.ledger.stats
    return feed.epoch, feed.stats.malformed, feed.stats.unreadable_events, stats.orphans, stats.misfits


class Auditor:
    """Opens audits. `feeds` are the KV event feeds that this process follows, by endpoint; `sizer` learns from answers."""

    def __init__(
        self,
        feeds: Mapping[str, PodFeed],
        parity: Parity,
        drift: Drift,
        lookup: Lookup,
        blocks: TokenBlockProcessor,
        sizer: Sizer,
        media: MediaNames | None = None,
    ) -> None:
        self._media = media
        self._feeds = feeds
        self._sizer = sizer
        self._parity = parity
        self._drift = drift
        self._lookup = lookup
        self._blocks = blocks
        self._drops = Drops()

    def open(self, prepared: Prepared, chosen: Candidate) -> Audit:
        """Begin to audit a request that goes to `chosen`."""
        feed = self._feeds.get(chosen.name)
        sampling, present = self._parity.sampling, None
        learn = partial(self._sizer.learn, prepared.request.model, prepared.prompt, prepared.sizing)
        prediction = None
        if prepared.late is None:
            prediction = self._unwatched(prepared, chosen) if feed is None else self.prediction(prepared, chosen, feed)
        try:
            if feed is not None:
                present = sampling.enter(feed, _model_at(feed, prepared), prepared.ids)
            late = None if prepared.late is None else LateAudit(self, feed)
            comparison = self._watched(prepared, chosen, feed, present)
            watched = self._media_watched(prepared, chosen, feed)
            return Audit(comparison, prediction, sampling, present, learn=learn, late=late, watched=watched)
        except BaseException:
            if present is not None:
                sampling.leave(present)
            if prediction is not None:
                prediction.end(computed=False)
            raise

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone."""
        self._drift.forget(endpoint)
        self._drops.forget(endpoint)
        self._parity.forget(endpoint)
        if self._media is not None:
            self._media.forget(endpoint)

    def keep_models(self, models: Container[str]) -> None:
        """Forget models that are not among `models`."""
        self._parity.keep_models(models)
        self._sizer.keep_models(models)

    def comparison(self, prepared: Prepared) -> Comparison | None:
        """Compare how many token ids we count with the engine's count."""
        if prepared.tokenizer is None or prepared.ids is None:
            return None
        return Comparison(self._parity, prepared.tokenizer, prepared.prompt, len(prepared.ids))

    def _watched(
        self, prepared: Prepared, chosen: Candidate, feed: PodFeed | None, present: Present | None
    ) -> Comparison | None:
        """Compare our token ids with the engine's: its count of them always, the ids themselves in a sample."""
        comparison = self.comparison(prepared)
        if comparison is None or prepared.ids is None:
            return None
        if feed is not None and present is not None and comparison.is_due(chosen.name, feed):
            witness = self._witness(prepared, prepared.ids, chosen, feed)
            if witness is not None:
                comparison.watch(chosen.name, feed, witness, present)
        return comparison

    def _media_watched(
        self, prepared: Prepared, chosen: Candidate, feed: PodFeed | None
    ) -> tuple[MediaNames, Watched] | None:
        """Learn from the endpoint's events what it makes of the prompt's media."""
        if prepared.outline is None or self._media is None or feed is None or feed.state not in SETTLED:
            return None
        model, salt = _model_at(feed, prepared), prepared.prompt.cache_salt
        if model != prepared.request.model or (salt and feed.ledger.hides_salts):
            return None
        mark = _losses(feed)

        def is_whole() -> bool:
            return self._feeds.get(chosen.name) is feed and feed.state in SETTLED and _losses(feed) == mark

        watched = self._media.watch(chosen.name, feed.ledger, model, salt, prepared.outline, is_whole)
        return None if watched is None else (self._media, watched)

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

    def _unwatched(self, prepared: Prepared, chosen: Candidate) -> Unwatched | None:
        """Predict the hit by what the writer of the endpoint's blocks has reported."""
        if chosen.trust not in ("exact", "partial") or chosen.engine_block is None or chosen.pending_blocks:
            return None
        if prepared.prompt.cache_salt or not prepared.prompt.reads_cache:
            return None
        proven = msgspec.structs.replace(chosen, recent_blocks=0)
        tokens = proven.cached_hit(prepared.request.prompt_tokens, prepared.request.block_size)
        return Unwatched(self._drift, chosen.name, tokens) if tokens else None

    def prediction(self, prepared: Prepared, chosen: Candidate, feed: PodFeed) -> Prediction | None:
        """Predict the hit where the index can and the answer may report it."""
        request, ledger = prepared.request, feed.ledger
        size, tokens, match = chosen.engine_block, request.prompt_tokens, chosen.matched_blocks
        if size is None or match is None or not tokens or feed.state not in SETTLED:
            return None
        if not prepared.prompt.reads_cache or (prepared.prompt.cache_salt and ledger.hides_salts):
            return None
        block, rule, chain, longest = request.block_size, ledger.rules.rule, request.chain, None
        if rule is None:
            if size % block:  # the engine may hold more than ends with a whole token block
                longest = (tokens - 1) // size * size
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
            dropped=chosen.dropped_tokens,
            explains=partial(self._explains, chosen.name, ledger, longest),
        ).open()

    def _explains(self, endpoint: str, ledger: Ledger, longest: int | None, predicted: int, cached: int) -> bool:
        return self._drops.explains(endpoint, ledger, predicted=predicted, cached=cached, longest=longest)


def _model_at(feed: PodFeed, prepared: Prepared) -> str:
    """The index's name of the request's model at one pod, whose engine may name it differently."""
    return feed.ledger.model if prepared.request.model == prepared.base_model else prepared.request.model
