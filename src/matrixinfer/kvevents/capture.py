"""Checks whether the events of a capture alone predict the hits that the engine reported.

A capture is JSON lines in the order in which things happened. `meta` describes the engine, `event` holds a frame
(`seq`, `payload_hex`, and `port` where several publishers were recorded), `request` a prompt (`label`, `body`,
`prompt_token_ids`), `response` what the engine said of it (`label`, `usage`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.errors import MatrixInferError
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import BlockStored, MalformedFrame, decode
from matrixinfer.prompt.conversation import has_media

_BASE = "base"
Row = Mapping[str, Any]


class CaptureError(MatrixInferError):
    """The file is not a capture, or holds nothing to check."""


class LedgerFactory(Protocol):
    """Makes the ledger under test."""

    def __call__(self, *, pod: str, model: str, blocks: TokenBlockProcessor, index: BlockIndex) -> Ledger:
        """As the constructor of `Ledger`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A request whose hit was predicted wrongly, in tokens."""

    label: str
    predicted: int
    actual: int


@dataclass(slots=True, kw_only=True)
class CaptureReport:
    """What one capture showed."""

    frames: int = 0
    events: int = 0
    requests: int = 0
    """Requests compared."""
    unsupported: list[str] = field(default_factory=list)
    """Labels of requests whose prompt depends on more than its tokens, adapter and salt."""
    mismatches: list[Mismatch] = field(default_factory=list)


def check_capture(
    rows: Iterable[Row], *, block_size: int | None = None, make_ledger: LedgerFactory = Ledger
) -> CaptureReport:
    """Replay a capture through the event core and compare each prediction with the engine's count.

    `block_size` is `blockSizeToHash`, by default the engine's own block size. Raises `CaptureError`.
    """
    rows = list(rows)
    engine_block = _engine_block_size(rows)
    if engine_block is None:
        raise CaptureError("the capture holds no readable BlockStored event")
    check = _Check(rows, engine_block, block_size or engine_block, make_ledger)
    for number, row in enumerate(rows, 1):
        try:
            check.take(row)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:  # rows are taken on trust
            raise CaptureError(f"row {number} is not as it should be: {error!r}") from error
    return check.report


class _Check:
    def __init__(self, rows: list[Row], engine_block: int, block_size: int, make_ledger: LedgerFactory) -> None:
        self.report = CaptureReport()
        self._engine_block = engine_block
        self._blocks = TokenBlockProcessor(block_size)
        self._index = MemoryIndex()
        self._make_ledger = make_ledger
        self._feeds: dict[str, PodFeed] = {}
        self._adapters = _adapters(rows)
        self._predicted: dict[str, int] = {}  # label -> tokens

    def take(self, row: Row) -> None:
        kind = row.get("kind")
        if kind == "event":
            self._event(row)
        elif kind == "request":
            self._request(row)
        elif kind == "response":
            self._response(row)

    def _event(self, row: Row) -> None:
        publisher = str(row.get("port", ""))
        feed = self._feeds.get(publisher)
        if feed is None:
            ledger = self._make_ledger(pod=publisher, model=_BASE, blocks=self._blocks, index=self._index)
            feed = self._feeds[publisher] = PodFeed(ledger, can_replay=False)
        payload = bytes.fromhex(row["payload_hex"])
        feed.live(row["seq"], payload)
        self.report.frames += 1
        try:
            self.report.events += len(decode(payload).events)
        except MalformedFrame:
            return

    def _request(self, row: Row) -> None:
        tokens, body = row.get("prompt_token_ids"), row.get("body") or {}
        if not tokens or body.get("n", 1) != 1:
            return
        model = body["model"] if body.get("model") in self._adapters else _BASE
        chain = self._blocks.chain(tokens, salt=body.get("cache_salt"))
        held = max(self._index.count(model, chain).values(), default=0) * self._blocks.block_size
        cap = (len(tokens) - 1) // self._engine_block * self._engine_block
        self._predicted[row["label"]] = min(held, cap)
        if "prompt_embeds" in body or has_media(body.get("messages", ())):
            self.report.unsupported.append(row["label"])

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
        if self._engine_block % size == 0:
            predicted -= predicted % self._engine_block
        else:
            predicted, actual = predicted // size * size, actual // size * size
        if predicted != actual:
            self.report.mismatches.append(Mismatch(label=label, predicted=predicted, actual=actual))


def _engine_block_size(rows: Iterable[Row]) -> int | None:
    for row in rows:
        if row.get("kind") == "event":
            try:
                events = decode(bytes.fromhex(row["payload_hex"])).events
            except (MalformedFrame, KeyError, ValueError):
                continue
            for event in events:
                if isinstance(event, BlockStored) and event.block_size > 0:
                    return event.block_size
    return None


def _adapters(rows: Iterable[Row]) -> set[str]:
    models = [model for row in rows if row.get("kind") == "meta" for model in row.get("models", {}).get("data", ())]
    return {model["id"] for model in models if model.get("parent")}
