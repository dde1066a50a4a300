"""An engine's event feed, recorded: conversations served two at a time from a simulated prefix cache of 16-token blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.prompts import prose, tokenizer_path
from matrixinfer.blocks import TokenIds
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.cache import Sequence as Cached
from matrixinfer.sim.events import BlockRemoved, BlockStored, Event, EventBatch, encode

BLOCK_TOKENS = 16
_STEP_TOKENS = 2_048  # an engine computes at most so many tokens of a prompt at once
_SYSTEM_TOKENS, _REPLY_TOKENS, _TURNS = 2_048, 64, 6


@dataclass(slots=True)
class Frames:
    """Payloads in order, and the engine blocks that they store and remove."""

    payloads: list[bytes] = field(default_factory=list)
    stored: int = 0
    removed: int = 0

    def take(self, events: list[Event]) -> None:
        """Add a batch."""
        self.payloads.append(encode(EventBatch(ts=0.0, events=events)))
        self.stored += sum(len(event.block_hashes) for event in events if isinstance(event, BlockStored))
        self.removed += sum(len(event.block_hashes) for event in events if isinstance(event, BlockRemoved))


def record(blocks: int) -> tuple[Frames, Frames]:
    """The feed of a cache of `blocks` blocks while it fills, and from the first removal until as many were removed."""
    cache = PagedPrefixCache(blocks, BLOCK_TOKENS)
    filling, turnover = Frames(), Frames()
    for prompts in _requests():
        for events in _serve(cache, [Cached(prompt, BLOCK_TOKENS) for prompt in prompts]):
            removes = any(isinstance(event, BlockRemoved) for event in events)
            (turnover if removes or turnover.removed else filling).take(events)
        if turnover.removed >= blocks:
            return filling, turnover
    raise AssertionError("requests never end")


def _requests() -> Iterator[list[TokenIds]]:
    """Pairs of prompts that run at once. Applications share system prompts; one pair in ten is the same prompt twice."""
    draw = random.Random(6)
    tokenizer = LocalTokenizer.load(tokenizer_path(), "chatml")
    text = tokenizer.encode(prose(0, 1_000_000), add_special_tokens=False)

    def cut(tokens: int) -> TokenIds:
        start = draw.randrange(len(text) - tokens)
        return text[start : start + tokens]

    systems = [cut(_SYSTEM_TOKENS) for _ in range(8)]
    sessions = [[draw.choice(systems)] for _ in range(64)]
    while True:
        pair = [draw.randrange(len(sessions)) for _ in range(2)]
        if draw.random() < 0.1:
            pair[1] = pair[0]
        for session in set(pair):
            if len(sessions[session]) > _TURNS:
                sessions[session] = [draw.choice(systems)]
            sessions[session].append(cut(draw.randint(300, 3_000)))
        yield [np.concatenate(sessions[session]) for session in pair]


def _serve(cache: PagedPrefixCache, running: Sequence[Cached]) -> Iterator[list[Event]]:
    """Compute prompts and replies; the events of each engine step that has any."""
    computed = []
    for sequence in running:
        hit = cache.lookup(sequence)
        computed.append(len(hit) * BLOCK_TOKENS)
        _allocate(cache, sequence, computed[-1], hit)
    ends = [len(sequence.tokens) + _REPLY_TOKENS for sequence in running]
    while computed != ends:
        for i, sequence in enumerate(running):
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


def _allocate(cache: PagedPrefixCache, sequence: Cached, computed: int, hit: Sequence[int] = ()) -> None:
    if not cache.allocate(sequence, computed, hit):
        raise ValueError(f"{cache.num_blocks} blocks are too few for two prompts")
