"""A recorded feed of engine events: conversations, served two at a time from a simulated prefix cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
import numpy as np

from bench.prompts import prose, tokenizer_path
from matrixinfer.blocks import TokenIds
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.cache import BlockHit, PagedPrefixCache
from matrixinfer.sim.events import BlockRemoved, BlockStored, Event, EventBatch, encode
from matrixinfer.sim.sequence import Sequence as Cached

_STEP_TOKENS = 2_048  # an engine computes at most this many tokens of a prompt per step
_SYSTEM_TOKENS, _REPLY_TOKENS, _TURNS = 2_048, 64, 6
_SYSTEMS, _SESSIONS = 8, 64


@dataclass(slots=True)
class Frames:
    """Payloads in order, and the number of engine blocks that they store and remove."""

    payloads: list[bytes] = field(default_factory=list)
    stored: int = 0
    removed: int = 0

    @property
    def blocks(self) -> int:
        """Engine blocks stored and removed together."""
        return self.stored + self.removed

    def append(self, events: list[Event]) -> None:
        """Add a batch."""
        self.payloads.append(encode(EventBatch(ts=0.0, events=events)))
        self.stored += sum(len(event.block_hashes) for event in events if isinstance(event, BlockStored))
        self.removed += sum(len(event.block_hashes) for event in events if isinstance(event, BlockRemoved))

    def as_arrays(self) -> Frames:
        """The same frames in the layout of vLLM 0.12 and SGLang."""
        return Frames([_as_arrays(payload) for payload in self.payloads], self.stored, self.removed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The feed of a cache, from an empty one on."""

    filling: Frames
    """Frames until the first block is removed."""
    turnover: Frames
    """Frames from then on, until as many blocks were removed as the cache has."""

    @property
    def payloads(self) -> list[bytes]:
        """All frames in order."""
        return self.filling.payloads + self.turnover.payloads


@cache
def _text() -> TokenIds:
    """The tokens that all conversations are cut from."""
    tokenizer = LocalTokenizer.load(tokenizer_path(), "chatml")
    return tokenizer.encode(prose(0, 1_000_000), add_special_tokens=False)


@cache  # several parts read the same feeds
def record(blocks: int, *, block_tokens: int = 16, pod: int = 0) -> Recording:
    """The feed of a cache of `blocks` blocks. Half of a pod's conversations are its own, half come to every pod."""
    prefixes = PagedPrefixCache(blocks, block_tokens)
    filling, turnover = Frames(), Frames()
    for prompts in _requests(_text(), pod):
        for events in _serve(prefixes, [Cached(prompt, block_tokens) for prompt in prompts]):
            removes = any(isinstance(event, BlockRemoved) for event in events)
            (turnover if removes or turnover.removed else filling).append(events)
        if turnover.removed >= blocks:
            return Recording(filling=filling, turnover=turnover)
    raise AssertionError("requests never end")


def _requests(text: TokenIds, pod: int) -> Iterator[list[TokenIds]]:
    """Pairs of prompts that run at the same time. One pair in ten is the same prompt twice."""
    draw = random.Random(pod)
    conversations = _conversations(text, pod, draw)
    sessions = [next(conversations) for _ in range(_SESSIONS)]

    def turn(session: int) -> TokenIds:
        for prompt in sessions[session]:
            return prompt
        sessions[session] = next(conversations)
        return turn(session)

    while True:
        pair = [turn(draw.randrange(_SESSIONS)) for _ in range(2)]
        yield pair[:1] * 2 if draw.random() < 0.1 else pair


def _conversations(text: TokenIds, pod: int, draw: random.Random) -> Iterator[Iterator[TokenIds]]:
    own = common = 0
    while True:
        if draw.random() < 0.5:
            own += 1
            yield _turns(text, random.Random(f"{own} of {pod}"))
        else:
            common += 1
            yield _turns(text, random.Random(f"{common} of all"))


def _turns(text: TokenIds, draw: random.Random) -> Iterator[TokenIds]:
    """The prompts of one conversation. Applications share system prompts."""
    prompt = _cut(text, random.Random(draw.randrange(_SYSTEMS)), _SYSTEM_TOKENS)
    for _ in range(_TURNS):
        prompt = np.concatenate((prompt, _cut(text, draw, draw.randint(300, 3_000))))
        yield prompt


def _cut(text: TokenIds, draw: random.Random, tokens: int) -> TokenIds:
    start = draw.randrange(len(text) - tokens)
    return text[start : start + tokens]


def _serve(cache: PagedPrefixCache, running: Sequence[Cached]) -> Iterator[list[Event]]:
    """Compute prompts and replies. Yields the events of each engine step that has any.

    As in vLLM, a block can be found from the step on that computes it, so the second of two equal prompts finds the
    blocks of the first one's first step.
    """
    computed: list[int] = []
    ends = [len(sequence.tokens) + _REPLY_TOKENS for sequence in running]
    while computed != ends:
        for i, sequence in enumerate(running):
            if i == len(computed):
                hit = cache.lookup(sequence)
                computed.append(hit.tokens)
                _allocate(cache, sequence, computed[i], hit)
            prompt = ends[i] - _REPLY_TOKENS
            if computed[i] < prompt:
                computed[i] = min(computed[i] + _STEP_TOKENS, prompt)
            elif computed[i] < ends[i]:
                sequence.append(computed[i] % 1_000)
                computed[i] += 1
            _allocate(cache, sequence, computed[i])
        if events := cache.take_events():
            yield events
    for sequence in running:
        cache.release(sequence)


def _allocate(cache: PagedPrefixCache, sequence: Cached, computed: int, hit: BlockHit | None = None) -> None:
    if not cache.allocate(sequence, computed, hit):
        raise ValueError(f"expected room for two prompts, got {cache.capacity} tokens")


_ARRAY_FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    "BlockRemoved": ("block_hashes", "medium"),
}


def _as_arrays(payload: bytes) -> bytes:
    ts, events, rank = msgspec.msgpack.decode(payload)
    return msgspec.msgpack.encode([ts, [_as_array(event) for event in events], rank])


def _as_array(event: dict[str, Any]) -> list[Any]:
    return [event["type"], *(event[name] for name in _ARRAY_FIELDS[event["type"]])]
