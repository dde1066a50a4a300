"""Random requests to an engine model, recorded as a capture: events, and what each lookup found.

The gateway's own check of captures then says whether the events predict every hit.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np

from matrixinfer.feedtools.capture import CaptureReport, check_capture
from matrixinfer.sim.media import MediumRun
from matrixinfer.sim.model import EngineModel, EngineRequest, Timing
from matrixinfer.sim.prefix_cache import Adapter, PrefixCache

Row = dict[str, Any]
PLACEHOLDER = 151_655
ADAPTERS = (Adapter(1, "french"), Adapter(2, "terse"))


class RecordingCache:
    """A cache that writes down its events and every lookup."""

    def __init__(self, cache: PrefixCache[Any, Any], meta: Row) -> None:
        self._cache = cache
        self._requests: dict[int, tuple[Any, Row]] = {}
        models = [{"id": "base", "parent": None}, *({"id": each.name, "parent": "base"} for each in ADAPTERS)]
        self.rows: list[Row] = [{"kind": "meta", "models": {"data": models}, **meta}]
        self._frames = self._lookups = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def sequence(
        self, tokens: Any, salt: str | None, adapter: Adapter | None, extra_key: str | None, media: Sequence[MediumRun]
    ) -> Any:
        sequence = self._cache.sequence(tokens, salt, adapter, extra_key, media)
        fields = {"cache_salt": salt, "extra_key": extra_key, "model": adapter and adapter.name}
        body = {"model": "base", "n": 1} | {name: value for name, value in fields.items() if value is not None}
        self._requests[id(sequence)] = sequence, {"body": body, "mm_features": [_feature(each) for each in media]}
        return sequence

    def lookup(self, sequence: Any) -> Any:
        self.take_events()
        hit = self._cache.lookup(sequence)
        label = str(self._lookups)
        self._lookups += 1
        _, request = self._requests[id(sequence)]
        self.rows.append({"kind": "request", "label": label, **request, "prompt_token_ids": sequence.tokens.tolist()})
        usage = {"prompt_tokens_details": {"cached_tokens": hit.tokens}}
        self.rows.append({"kind": "response", "label": label, "status": 200, "usage": usage})
        return hit

    def take_events(self) -> list[Any]:
        events = self._cache.take_events()
        if events:
            payload = msgspec.msgpack.encode((float(self._frames), events, 0))
            self.rows.append({"kind": "event", "seq": self._frames, "payload_hex": payload.hex()})
            self._frames += 1
        return events


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is asked of the engine."""

    requests: int = 250
    longest: int = 150
    """Tokens of the longest prompt."""
    vocabulary: int = 12
    chunk: int = 64
    """Tokens of a step."""
    unit: int = 16
    """Prompts often end on multiples of it."""
    salts: float = 0.1
    adapters: float = 0.1
    extra_keys: float = 0.0
    media: float = 0.0
    """Share of prompts that get one more medium, and of those in which one is exchanged."""


def record(cache: PrefixCache[Any, Any], *, seed: int, shape: Shape, meta: Row) -> list[Row]:
    """Serve random prompts, which share prefixes, extend replies, are aborted, and overflow the cache."""
    draw = random.Random(seed)
    recording = RecordingCache(cache, meta)
    model: EngineModel[Any, Any] = EngineModel(
        cast("Any", recording), Timing(), max_tokens=shape.chunk, max_sequences=4
    )
    vocabulary = [draw.randrange(150_000) for _ in range(shape.vocabulary)]
    history: list[_Prompt] = []
    recording.take_events()
    for number in range(shape.requests):
        ids, media = prompt = _prompt(draw, history, vocabulary, shape)
        reply = [draw.choice(vocabulary) for _ in range(draw.choice([1, 2, 20, 2 * shape.unit]))]
        history = [*history, prompt, _Prompt(ids + reply, media)][-40:]
        model.submit(
            EngineRequest(
                id=number,
                prompt=np.array(ids, dtype=np.uint32),
                reply=reply,
                salt=draw.choice(["a", "b"]) if draw.random() < shape.salts else None,
                adapter=draw.choice(ADAPTERS) if draw.random() < shape.adapters else None,
                extra_key=draw.choice(["x", "y"]) if draw.random() < shape.extra_keys else None,
                media=media,
            )
        )
        for _ in range(draw.choice([0, 1, 2, 30])):
            model.step()
        if draw.random() < 0.05:
            model.abort(draw.randrange(number + 1))
        if not number % 60:
            while model.busy:
                model.step()
            model.reset_prefix_cache()
    while model.busy:
        model.step()
    return recording.rows


class _Prompt(NamedTuple):
    ids: list[int]
    media: list[MediumRun]


def _prompt(draw: random.Random, history: list[_Prompt], vocabulary: list[int], shape: Shape) -> _Prompt:
    ids: list[int] = []
    media: list[MediumRun] = []
    if history and draw.random() < 0.8:
        known = draw.choice(history)
        ids, media = list(known.ids), list(known.media)
        cut = draw.random()
        if cut < 0.6:
            ids = ids[: draw.randrange(1, len(ids) + 1)]
        if cut < 0.3:
            ids = ids[: max(1, len(ids) // shape.unit) * shape.unit + draw.choice([0, 0, 1, 2])]
    media = [each for each in media if each.start + each.length <= len(ids)]
    if shape.media and draw.random() < shape.media:
        length = draw.choice([1, 3, shape.unit, shape.longest // 4])
        media.append(MediumRun(len(ids), length, draw.choice("xyz")))
        ids += [PLACEHOLDER] * length
    if media and draw.random() < shape.media:
        at = draw.randrange(len(media))
        media[at] = media[at]._replace(name=draw.choice("xyz"))
    if not ids or draw.random() < 0.6:
        ids = ids + [draw.choice(vocabulary) for _ in range(draw.randrange(1, shape.longest // 3))]
    return _Prompt(ids[: shape.longest], [each for each in media if each.start < shape.longest])


def _feature(medium: MediumRun) -> Row:
    return {"identifier": medium.name, "offset": medium.start, "length": medium.length}


def check(rows: list[Row], *, block_size: int | None = None) -> tuple[CaptureReport, Counter[str]]:
    """The gateway's check of a recording, and how many lookups hit, removed blocks and so on."""
    counts: Counter[str] = Counter()
    for row in rows:
        if row["kind"] == "response":
            counts["lookups"] += 1
            counts["hits"] += row["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        elif row["kind"] == "event":
            batch = msgspec.msgpack.decode(bytes.fromhex(row["payload_hex"]))
            counts.update(event["type"] for event in batch[1])
    return check_capture(rows, block_size=block_size), counts
