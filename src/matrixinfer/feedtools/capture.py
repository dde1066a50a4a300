"""Checks whether the events of a capture alone predict the hits that the engine reported.

A capture is JSON lines in the order in which things happened. A `meta` line describes the engine, an `event` holds a
frame (`seq`, `payload_hex`, and `port` if several publishers were recorded), a `request` a prompt (`label`, `body`,
`prompt_token_ids`), and a `response` the engine's report about it (`label`, `usage`).

Prompts whose hits the events cannot predict are listed, not compared: those with media or embeddings; those with a salt
or an adapter in a layout that hides it; and those that several publishers hold in different lengths, as the capture
does not say which of them was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec import UNSET

from matrixinfer.blocks import BlockChain, TokenBlockProcessor
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.errors import MatrixInferError
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.ends import search
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import Batch, BlockStored, MalformedFrame, decode
from matrixinfer.prompt.conversation import has_media

_BASE = "base"
Row = Mapping[str, Any]


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
    facts = _Facts()
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


class _Facts:
    """What the whole capture says about its engine."""

    def __init__(self) -> None:
        self.publishers: dict[str, None] = {}  # an ordered set
        self.adapters: set[str] = set()
        self.engine_block: int | None = None
        self.requests = False
        self.hides_salts = False
        self.hides_adapters = False
        self.groups: list[Mapping[str, Any]] = []
        """What `meta` says of attention groups, where it does: of all that, events leave out the chunk and the drop."""
        self.drops: list[int] = []

    def learn(self, row: Row) -> None:
        kind = row.get("kind")
        if kind == "meta":
            models = row.get("models", {}).get("data", ())
            self.adapters |= {model["id"] for model in models if model.get("parent")}
            self.groups = row.get("groups") or []
            if row.get("use_eagle"):
                self.drops = [number for number, group in enumerate(self.groups) if group.get("eagle")]
        elif kind == "request":
            self.requests = True
        elif kind == "event":
            self.publishers[_publisher(row)] = None
            batch = _batch(row)
            for event in () if batch is None else batch.events:
                if isinstance(event, BlockStored):
                    self._learn_layout(event)

    def _learn_layout(self, event: BlockStored) -> None:
        if self.engine_block is None and event.block_size > 0:
            self.engine_block = event.block_size
        self.hides_salts |= event.hides_keys
        self.hides_adapters |= event.lora_name is UNSET


class _Check:
    def __init__(self, facts: _Facts, engine_block: int, block_size: int, make_ledger: LedgerFactory) -> None:
        self.report = CaptureReport()
        self._facts = facts
        self._engine_block = engine_block
        self._blocks = TokenBlockProcessor(block_size)
        self._index = MemoryIndex()
        self._feeds = {
            name: PodFeed(make_ledger(pod=name, model=_BASE, blocks=self._blocks, index=self._index), can_replay=False)
            for name in facts.publishers
        }
        for feed in self._feeds.values():
            feed.ledger.reusable.drops(facts.drops)
            for number, group in enumerate(facts.groups):
                if group.get("attention_chunk_size"):
                    feed.ledger.reusable.chunks(number, group["attention_chunk_size"])
        self._events = dict.fromkeys(facts.publishers, 0)
        self._predicted: dict[str, int] = {}  # label -> tokens

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
            )
            for name, feed in self._feeds.items()
        ]
        self.report.frames = sum(publisher.frames for publisher in self.report.publishers)
        self.report.events = sum(self._events.values())
        return self.report

    def _event(self, row: Row) -> None:
        name = _publisher(row)
        self._feeds[name].live(row["seq"], bytes.fromhex(row["payload_hex"]))
        batch = _batch(row)
        self._events[name] += 0 if batch is None else len(batch.events)

    def _request(self, row: Row) -> None:
        tokens, body = row.get("prompt_token_ids"), row.get("body") or {}
        if not tokens or body.get("n", 1) != 1:
            return
        model = body["model"] if body.get("model") in self._facts.adapters else _BASE
        chain = self._blocks.chain(tokens, salt=body.get("cache_salt"))
        hits = {name: self._hit(name, feed, model, chain, len(tokens)) for name, feed in self._feeds.items()}
        self._predicted[row["label"]] = max(hits.values(), default=0)
        reason = self._why_not(body, model, set(hits.values()))
        if reason is not None:
            self.report.unsupported[row["label"]] = reason

    def _hit(self, name: str, feed: PodFeed, model: str, chain: BlockChain, tokens: int) -> int:
        """Tokens of a prompt that a publisher's engine will find in its cache."""
        reusable, matched = feed.ledger.reusable, self._index.count(model, chain).get(name, 0)
        rule = reusable.rule
        if rule is None:
            size = self._engine_block
            return max(0, min(self._tokens(model, chain, name, matched), tokens - 1) // size * size - reusable.drop)
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

    def _why_not(self, body: Row, model: str, lengths: set[int]) -> str | None:
        """Why the events cannot predict this prompt's hit; `lengths` in token blocks, of all publishers."""
        if "prompt_embeds" in body or has_media(body.get("messages", ())):
            return "more than tokens"
        if self._facts.hides_salts and body.get("cache_salt") is not None:
            return "the layout hides salts"
        if self._facts.hides_adapters and model != _BASE:
            return "the layout hides the names of adapters"
        if len(lengths) > 1:
            return "its publishers differ"
        return next((feed.untrusted for feed in self._feeds.values() if feed.untrusted is not None), None)

    def _response(self, row: Row) -> None:
        label, usage = row.get("label", ""), row.get("usage")
        if label not in self._predicted or not isinstance(usage, Mapping):
            return
        actual = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if not isinstance(actual, int) or label in self.report.unsupported:
            return
        self.report.requests += 1
        predicted = self._predicted.pop(label)
        size = self._blocks.block_size
        if self._engine_block % size:  # token blocks are no more precise
            predicted, actual = predicted // size * size, actual // size * size
        if predicted != actual:
            self.report.mismatches.append(Mismatch(label=label, predicted=predicted, actual=actual))


def _publisher(row: Row) -> str:
    return str(row.get("port", ""))


def _batch(row: Row) -> Batch | None:
    """The frame's events; None if it cannot be read."""
    try:
        return decode(bytes.fromhex(row["payload_hex"]))
    except (MalformedFrame, KeyError, TypeError, ValueError):
        return None
