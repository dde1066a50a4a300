"""The radix tree, compared with recordings of SGLang's own."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TypedDict

import msgspec
import numpy as np
import pytest

from matrixinfer.sim.radix import PageHit, PageSequence, RadixCache
from matrixinfer.sim.radix_events import Event

from .drive import digest
from .drive_groups import drive


class _Run(TypedDict):
    page_size: int
    pages: int
    pairs: bool
    seed: int
    steps: int
    lookups: int
    hit_tokens: int
    hits_sha256: str
    batches: int
    events_sha256: str


class _Recording(TypedDict):
    source: str
    runs: list[_Run]


RECORDING = msgspec.json.decode(Path(__file__).with_name("sglang_pages.json").read_bytes(), type=_Recording)


class PageRequest:
    """A request of the radix tree."""

    def __init__(self, sequence: PageSequence, hit: PageHit) -> None:
        self.sequence = sequence
        self.tokens = sequence.tokens
        self.hit: PageHit | None = hit
        self.computed = hit.tokens


class PageManager:
    """The radix tree, as it is driven."""

    def __init__(self, cache: RadixCache) -> None:
        self._cache = cache

    def new_step(self) -> None:
        pass

    def begin(self, ids: list[int], salt: str | None) -> tuple[PageRequest, int]:
        sequence = self._cache.sequence(np.array(ids, dtype=np.uint32), salt)
        hit = self._cache.lookup(sequence)
        return PageRequest(sequence, hit), hit.tokens

    def advance(self, request: PageRequest, count: int) -> bool:
        if not self._cache.allocate(request.sequence, request.computed + count, request.hit):
            return False
        request.computed, request.hit = request.computed + count, None
        self._cache.computed(request.sequence, request.computed)
        return True

    def append(self, request: PageRequest, token: int) -> None:
        request.sequence.append(token)

    def free(self, request: PageRequest) -> None:
        self._cache.release(request.sequence)

    def reset(self) -> bool:
        return self._cache.reset()

    def take_events(self) -> list[Event]:
        return self._cache.take_events()


@pytest.mark.parametrize(
    "run", RECORDING["runs"], ids=lambda run: f"page-{run['page_size']}{'-pairs' * run['pairs']}-{run['seed']}"
)
def test_every_hit_and_every_event_equals_sglangs(run: _Run) -> None:
    manager = PageManager(RadixCache(run["pages"], run["page_size"], pairs=run["pairs"]))
    hits, batches = drive(manager, seed=run["seed"], steps=run["steps"], unit=max(run["page_size"], 8))
    assert (len(hits), sum(hits), len(batches)) == (run["lookups"], run["hit_tokens"], run["batches"])
    assert sha256(json.dumps(hits).encode()).hexdigest() == run["hits_sha256"]
    assert digest(batches) == run["events_sha256"]
