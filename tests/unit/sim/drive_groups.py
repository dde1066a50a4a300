"""Random calls of a cache: those under which those of vLLM (`vllm_groups.json`) and SGLang (`sglang_pages.json`) were recorded."""

from __future__ import annotations

import random
from typing import Any, Protocol

import numpy as np

from matrixinfer.sim.cache import BlockHit, PagedPrefixCache
from matrixinfer.sim.events import Event
from matrixinfer.sim.sequence import Sequence

VOCABULARY = 12
STEP_TOKENS = 256
LONGEST = 400


class Request(Protocol):
    """A request under way."""

    computed: int
    tokens: Any


class Manager(Protocol):
    """What is driven: a simulated cache or, when it was recorded, an engine's."""

    def new_step(self) -> None: ...
    def begin(self, ids: list[int], salt: str | None) -> tuple[Any, int]: ...
    def advance(self, request: Any, count: int) -> bool: ...
    def append(self, request: Any, token: int) -> None: ...
    def free(self, request: Any) -> None: ...
    def reset(self) -> bool: ...
    def take_events(self) -> list[Any]: ...


class SimRequest:
    """A request of the simulated cache."""

    def __init__(self, sequence: Sequence, hit: BlockHit) -> None:
        self.sequence = sequence
        self.tokens = sequence.tokens
        self.hit: BlockHit | None = hit
        self.computed = hit.tokens


class SimManager:
    """The simulated cache."""

    def __init__(self, cache: PagedPrefixCache) -> None:
        self._cache = cache

    def new_step(self) -> None:
        self._cache.new_step()

    def begin(self, ids: list[int], salt: str | None) -> tuple[SimRequest, int]:
        sequence = self._cache.sequence(np.array(ids, dtype=np.uint32), salt)
        hit = self._cache.lookup(sequence)
        return SimRequest(sequence, hit), hit.tokens

    def advance(self, request: SimRequest, count: int) -> bool:
        """Compute up to `count` tokens. False if there is no room, or nothing that one step may compute."""
        count = self._cache.chunk(request.sequence, request.computed, count, STEP_TOKENS)
        if not count or not self._cache.allocate(request.sequence, request.computed + count, request.hit):
            return False
        request.computed, request.hit = request.computed + count, None
        return True

    def append(self, request: SimRequest, token: int) -> None:
        request.sequence.append(token)

    def free(self, request: SimRequest) -> None:
        self._cache.release(request.sequence)

    def reset(self) -> bool:
        return self._cache.reset()

    def take_events(self) -> list[Event]:
        return self._cache.take_events()


def drive(manager: Manager, *, seed: int, steps: int, unit: int) -> tuple[list[int], list[list[Any]]]:
    """Drive `steps` steps. Returns the tokens that each lookup found, and the event batches.

    The random draws and their order are those of the recording: changing any makes the comparison meaningless.
    """
    draw = random.Random(seed)
    vocabulary = [draw.randrange(150_000) for _ in range(VOCABULARY)]
    running: list[Any] = []
    history: list[list[int]] = []
    hits: list[int] = []
    batches: list[list[Any]] = []
    for step in range(steps):
        manager.new_step()
        for request in list(running):
            if request.computed == len(request.tokens):
                manager.append(request, draw.choice(vocabulary))
            left = len(request.tokens) - request.computed
            if draw.random() < 0.1 or not manager.advance(request, min(left, draw.choice([32, 96, STEP_TOKENS]))):
                running.remove(request)
                manager.free(request)
                history = [*history, list(request.tokens)][-40:]
        if not step % 60 and not running:
            manager.reset()
        if len(running) < 4 and draw.random() < 0.6:
            ids = _prompt(draw, history, vocabulary, unit)
            history = [*history, ids][-40:]
            request, hit = manager.begin(ids, draw.choice(["a", "b"]) if draw.random() < 0.1 else None)
            hits.append(hit)
            if manager.advance(request, min(len(ids) - hit, STEP_TOKENS)):
                running.append(request)
        batches.append(manager.take_events())
    return hits, [batch for batch in batches if batch]


def _prompt(draw: random.Random, history: list[list[int]], vocabulary: list[int], unit: int) -> list[int]:
    """A known prefix, often cut at a boundary, often followed by new tokens."""
    ids: list[int] = []
    if history and draw.random() < 0.8:
        ids = list(draw.choice(history))
        cut = draw.random()
        if cut < 0.6:
            ids = ids[: draw.randrange(1, len(ids) + 1)]
        if cut < 0.3:
            ids = ids[: max(1, len(ids) // unit) * unit + draw.choice([0, 0, 1, 2])]
    if draw.random() < 0.6 or not ids:
        ids = ids + [draw.choice(vocabulary) for _ in range(draw.randrange(1, 5 * unit))]
    return ids[:LONGEST]
