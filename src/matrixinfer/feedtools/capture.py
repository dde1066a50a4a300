"""Checks whether the events of a capture alone predict the hits that the engine reported.

A capture is JSON lines in the order in which things happened. A `meta` line describes the engine, an `event` holds a
frame (`seq`, `payload_hex`, and `port` if several publishers were recorded), a `request` a prompt (`label`, `body`,
`prompt_token_ids`), and a `response` the engine's report about it (`label`, `usage`).

Prompts whose hits the events cannot predict are listed, not compared: those with media or embeddings; those with a salt
or an adapter in a layout that hides it; and those that several publishers hold in different lengths, as the capture
does not say which of them was asked. So are those that rest on something that the engine does not publish, or on events
that can be read in two ways; unless the hit is shorter or longer than that explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from matrixinfer.blocks import BlockChain, Medium, TokenBlockProcessor
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.errors import MatrixInferError
from matrixinfer.feedtools.facts import (
    COMPONENTS,
    EXTRA_KEY,
    EXTRA_KEY_SHARED,
    FINE_HITS,
    Facts,
    Row,
    batch_of,
    publisher,
)
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.ends import search
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.limits import (
    CHUNKED,
    CHUNKED_ALONE,
    DROPPED_SIZES,
    DROPPED_WINDOWS,
    FINE_STATES,
    SLOWER_TIERS,
    SPARSE_WINDOWS,
    UNKNOWN_KIND,
    UNLINKED,
)
from matrixinfer.prompt.conversation import has_media

_BASE = "base"
_LENGTHEN = (CHUNKED, CHUNKED_ALONE, DROPPED_WINDOWS, FINE_STATES, SLOWER_TIERS, SPARSE_WINDOWS, UNLINKED)
"""Limits with which hits may be longer than predicted, never shorter."""


class CaptureError(MatrixInferError):
    """The file is not a capture, or there is nothing in it to check."""


class LedgerFactory(Protocol):
    """Makes the ledger under test."""

    def __call__(self, *, pod: str, model: str, blocks: TokenBlockProcessor, index: BlockIndex) -> Ledger:
        """Take the arguments of `Ledger`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A request with a wrong prediction, in tokens."""

    label: str
    predicted: int
    actual: int


@dataclass(slots=True, kw_only=True)
class PublisherReport:
    """One publisher's events, and what they add up to."""

    name: str
    """Its `port`; empty if the capture does not have one."""
    frames: int
    malformed: int
    """Frames that are not a batch of events."""
    gaps: int
    restarts: int
    events: int
    unreadable: int
    """Events that could not be read."""
    misfits: int
    """Events whose tokens do not fit their blocks."""
    blocks: int
    """Engine blocks held at the end."""
    orphans: int
    """Engine blocks dropped because their parent was never seen."""
    untrusted: str | None
    """Why its events do not say what the engine holds; None if they do."""
    limits: tuple[str, ...] = ()
    """What they cannot tell."""


@dataclass(slots=True, kw_only=True)
class CaptureReport:
    """The result of checking one capture."""

    frames: int = 0
    events: int = 0
    requests: int = 0
    """Requests compared."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """The requests whose hits the events cannot predict: their labels, and why."""
    mismatches: list[Mismatch] = field(default_factory=list)
    publishers: list[PublisherReport] = field(default_factory=list)

    @property
    def unreadable(self) -> int:
        """Frames and events that could not be read."""
        return sum(publisher.malformed + publisher.unreadable for publisher in self.publishers)


def check_capture(
    rows: Iterable[Row], *, block_size: int | None = None, make_ledger: LedgerFactory = Ledger
) -> CaptureReport:
    """Run a capture through the feed and the ledger, and compare each prediction with the hit that the engine reported.

    `rows` is iterated twice. `block_size` is `blocks.size`, by default the engine's block size. Raises `CaptureError`.
    """
    facts = Facts()
    _for_each(rows, facts.learn)
    if not facts.publishers:
        raise CaptureError("the capture holds no events")
    if facts.engine_block is None and facts.requests:
        raise CaptureError("the capture holds no readable BlockStored event")
    engine_block = facts.engine_block or 16  # without requests the size does not matter
    check = _Check(facts, engine_block, block_size or engine_block, make_ledger)
    _for_each(rows, check.take)
    return check.finish()


def _for_each(rows: Iterable[Row], step: Callable[[Row], None]) -> None:
    for number, row in enumerate(rows, 1):
        try:
            step(row)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:  # rows are not validated
            raise CaptureError(f"row {number} is malformed: {error!r}") from error


class _Reading:
    """One way to read the events: the feeds of all publishers, and the index that they fill."""

    def __init__(
        self, facts: Facts, engine_block: int, blocks: TokenBlockProcessor, make_ledger: LedgerFactory
    ) -> None:
        self._engine_block = engine_block
        self._blocks = blocks
        self._index = MemoryIndex()
        self.feeds = {
            name: PodFeed(make_ledger(pod=name, model=_BASE, blocks=blocks, index=self._index), can_replay=False)
            for name in facts.publishers
        }
        for feed in self.feeds.values():
            feed.ledger.reusable.drops(facts.drops)
            for number, group in enumerate(facts.groups):
                if group.get("attention_chunk_size"):
                    feed.ledger.rules.chunks(number, group["attention_chunk_size"])

    def hits(self, model: str, chain: BlockChain, tokens: int) -> list[int]:
        """Tokens of a prompt that each publisher's engine will find in its cache."""
        return [self._hit(name, feed, model, chain, tokens) for name, feed in self.feeds.items()]

    def _hit(self, name: str, feed: PodFeed, model: str, chain: BlockChain, tokens: int) -> int:
        """Tokens of a prompt that a publisher's engine will find in its cache."""
        rules, matched = feed.ledger.rules, self._index.count(model, chain).get(name, 0)
        rule = rules.rule
        if rule is None:
            size = self._engine_block
            return max(0, min(self._tokens(model, chain, name, matched), tokens - 1) // size * size - rules.drop)
        ends = EndpointName.parse(name).ends
        asking = search([ends], chain, rule, tokens=tokens, blocks=matched)
        try:
            question = next(asking)
            while True:
                question = asking.send(self._index.last_of(model, *question))
        except StopIteration as done:
            found: dict[str, int] = done.value
            return found.get(ends, 0)

    def _tokens(self, model: str, chain: BlockChain, publisher: str, blocks: int) -> int:
        """Tokens behind `blocks` matched blocks of a publisher, with the tail if engine blocks straddle token blocks."""
        tail = chain.tail(blocks, self._engine_block)
        more = tail[0] if tail and publisher in self._index.count(model, tail[1:]) else 0
        return blocks * self._blocks.block_size + more


@dataclass(frozen=True, slots=True)
class _Prediction:
    tokens: int
    reason: str | None = None
    """Why the hit cannot be predicted."""
    is_least: bool = False
    """It cannot be shorter, whatever the reason."""
    is_most: bool = False
    """It cannot be longer, whatever the reason."""

    def contradicts(self, actual: int) -> bool:
        """Whether the prediction was wrong in a way that its reason does not explain."""
        return (self.is_least and actual < self.tokens) or (self.is_most and actual > self.tokens)


class _Check:
    def __init__(self, facts: Facts, engine_block: int, block_size: int, make_ledger: LedgerFactory) -> None:
        self.report = CaptureReport()
        self._facts = facts
        self._engine_block = engine_block
        self._blocks = TokenBlockProcessor(block_size)
        self._reading = _Reading(facts, engine_block, self._blocks, make_ledger)
        self._others = {
            reason: _Reading(facts, engine_block, self._blocks, other)
            for reason, other in (facts.readings() if make_ledger is Ledger else ())
        }
        self._events = dict.fromkeys(facts.publishers, 0)
        self._predicted: dict[str, _Prediction] = {}  # by label
        self._unseen: set[int] = set()  # first blocks of prompts whose `extra_key` the events do not show
        self._short: dict[tuple[str, Any], dict[tuple[int, ...], None]] = {}  # such prompts of less than a block

    def take(self, row: Row) -> None:
        kind = row.get("kind")
        if kind == "event":
            self._event(row)
        elif kind == "request":
            self._request(row)
        elif kind == "response":
            self._response(row)

    def finish(self) -> CaptureReport:
        """The report, after every row was taken."""
        self.report.publishers = [
            PublisherReport(
                name=name,
                frames=feed.stats.frames,
                malformed=feed.stats.malformed,
                gaps=feed.stats.gaps,
                restarts=feed.stats.restarts,
                events=self._events[name],
                unreadable=feed.stats.unreadable_events,
                misfits=feed.ledger.stats.misfits,
                blocks=len(feed.ledger),
                orphans=feed.ledger.stats.orphans,
                untrusted=feed.untrusted,
                limits=feed.ledger.limits,
            )
            for name, feed in self._reading.feeds.items()
        ]
        self.report.frames = sum(publisher.frames for publisher in self.report.publishers)
        self.report.events = sum(self._events.values())
        return self.report

    def _event(self, row: Row) -> None:
        name = publisher(row)
        for reading in (self._reading, *self._others.values()):
            reading.feeds[name].live(row["seq"], bytes.fromhex(row["payload_hex"]))
        batch = batch_of(row)
        self._events[name] += 0 if batch is None else len(batch.events)

    def _request(self, row: Row) -> None:
        tokens, body = row.get("prompt_token_ids"), row.get("body") or {}
        if not tokens or body.get("n", 1) != 1:
            return
        model = body["model"] if body.get("model") in self._facts.adapters else _BASE
        media = _media(row)
        chain = self._blocks.chain(tokens, salt=body.get("cache_salt"), media=media or ())
        hits = self._reading.hits(model, chain, len(tokens))
        reason = self._why_not(body, model, chain, hits, media) or self._shares_extra_key(body, model, chain, tokens)
        if reason is not None:
            prediction = _Prediction(max(hits, default=0), reason)
        else:
            others = (why for why, reading in self._others.items() if reading.hits(model, chain, len(tokens)) != hits)
            prediction = self._limited(max(hits, default=0), next(others, None))
        self._predicted[row["label"]] = prediction
        if prediction.reason is not None:
            self.report.unsupported[row["label"]] = prediction.reason

    def _limited(self, tokens: int, reason: str | None) -> _Prediction:
        """The prediction of a hit, with what limits it: how far the events see, or else that `reason`."""
        limits = [words for feed in self._reading.feeds.values() for words in feed.ledger.limits]
        if self._facts.fine_hits:
            return _Prediction(tokens, FINE_HITS, is_least=True)
        if DROPPED_SIZES in limits:
            return _Prediction(tokens, DROPPED_SIZES)
        for words in limits:
            if words in _LENGTHEN:
                return _Prediction(tokens, words, is_least=True)
        if tokens and self._facts.components:
            return _Prediction(tokens, COMPONENTS, is_most=True)
        for words in limits:
            if tokens and words.startswith(UNKNOWN_KIND):
                return _Prediction(tokens, words, is_most=True)
        return _Prediction(tokens, reason)

    def _why_not(
        self, body: Row, model: str, chain: BlockChain, hits: list[int], media: Sequence[Medium] | None
    ) -> str | None:
        """Why the events say nothing of this prompt's hit."""
        if "prompt_embeds" in body or (media is None and has_media(body.get("messages", ()))):
            return "more than tokens"
        if self._facts.hides_salts and body.get("cache_salt") is not None:
            return "the layout hides salts"
        if self._facts.hides_adapters and model != _BASE:
            return "the layout hides the names of adapters"
        if len(set(hits)) > 1:
            return "its publishers differ"
        feeds = self._reading.feeds.values()
        return next((feed.untrusted for feed in feeds if feed.untrusted is not None), None)

    def _shares_extra_key(self, body: Row, model: str, chain: BlockChain, tokens: list[int]) -> str | None:
        """Why the events say nothing of a prompt with an `extra_key`, or with the first page of one that has."""
        place = model, body.get("cache_salt")
        short = self._short.setdefault(place, {})
        if body.get("extra_key") is not None:
            if len(chain):
                self._unseen.update(chain[:1])
            else:
                short[tuple(tokens)] = None
            return EXTRA_KEY
        if not self._unseen.isdisjoint(chain[:1]) or any(tuple(tokens[: len(start)]) == start for start in short):
            return EXTRA_KEY_SHARED
        return None

    def _response(self, row: Row) -> None:
        label, usage = row.get("label", ""), row.get("usage")
        if label not in self._predicted or not isinstance(usage, Mapping):
            return
        actual = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if not isinstance(actual, int):
            return
        prediction = self._predicted[label]
        if prediction.reason is not None:
            if not prediction.contradicts(actual):
                return
            del self.report.unsupported[label]
        self.report.requests += 1
        del self._predicted[label]
        predicted, size = prediction.tokens, self._blocks.block_size
        if self._engine_block % size:  # token blocks are no more precise
            predicted, actual = predicted // size * size, actual // size * size
        if predicted != actual:
            self.report.mismatches.append(Mismatch(label=label, predicted=predicted, actual=actual))


def _media(row: Row) -> list[Medium] | None:
    """The engine's names of the media in a recorded prompt, and where they begin; None where the row does not say it."""
    features = row.get("mm_features")
    if not isinstance(features, list):
        return None
    try:
        return sorted((int(each["offset"]), str(each["identifier"])) for each in features)
    except (KeyError, TypeError, ValueError) as error:
        raise CaptureError(
            "`mm_features` of a request needs an `identifier` and an `offset` for each medium"
        ) from error
