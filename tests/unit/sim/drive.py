"""Random calls of a cache: the same calls under which vLLM's own manager was recorded (see `vllm_0_32.json`)."""

from __future__ import annotations

import random
from collections.abc import Iterable
from hashlib import sha256

import msgspec
import numpy as np

from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.events import Event
from matrixinfer.sim.sequence import Sequence

VOCABULARY = 40
SALTED = 0.1


def drive(*, block_size: int, num_blocks: int, seed: int, steps: int) -> tuple[list[int], list[list[Event]]]:
    """Make `steps` random calls. Returns the tokens that each lookup found, and the event batches.

    The random draws and their order are those of the recording: changing any makes the comparison meaningless.
    """
    rng = random.Random(seed)
    cache = PagedPrefixCache(num_blocks, block_size)
    vocabulary = [rng.randrange(150_000) for _ in range(VOCABULARY)]
    running: list[Sequence] = []
    history: list[list[int]] = []
    hits: list[int] = []
    batches: list[list[Event]] = []
    for _ in range(steps):
        batches.append(cache.take_events())
        draw = rng.random()
        if running and (draw < 0.35 or len(running) >= 4):
            cache.release(running.pop(rng.randrange(len(running))))
            continue
        if running and draw < 0.6:
            _decode(cache, running, rng, vocabulary)
            continue
        if draw > 0.995 and not running:
            cache.reset()
            batches.append(cache.take_events())
        ids = _prompt(rng, history, vocabulary, block_size)[: (num_blocks - 2) * block_size // 2]
        history = [*history, ids][-40:]
        salt = rng.choice(["salt-a", "salt-b"]) if rng.random() < SALTED else None
        sequence = Sequence(np.array(ids, dtype=np.uint32), block_size, salt)
        hit = cache.lookup(sequence)
        hits.append(hit.tokens)
        if cache.allocate(sequence, len(ids), hit):
            running.append(sequence)
    batches.append(cache.take_events())
    return hits, [batch for batch in batches if batch]


def _decode(cache: PagedPrefixCache, running: list[Sequence], rng: random.Random, vocabulary: list[int]) -> None:
    sequence = rng.choice(running)
    sequence.append(rng.choice(vocabulary))
    if not cache.allocate(sequence, len(sequence.tokens)):
        running.remove(sequence)
        cache.release(sequence)


def _prompt(rng: random.Random, history: list[list[int]], vocabulary: list[int], block_size: int) -> list[int]:
    """A known prefix, often cut at a block boundary, often followed by new tokens."""
    ids: list[int] = []
    if history and rng.random() < 0.75:
        ids = list(rng.choice(history))
        ids = ids[: rng.randrange(1, len(ids) + 1)]
        if rng.random() < 0.5:
            ids = ids[: max(block_size, len(ids) // block_size * block_size)]
    if rng.random() < 0.5 or not ids:
        ids = ids + [rng.choice(vocabulary) for _ in range(rng.randrange(1, 5 * block_size))]
    return ids


def digest(batches: Iterable[Iterable[object]]) -> str:
    """SHA-256 of event batches, independent of block hashes: each is replaced by a number, in order of appearance.

    Events are structs or, from a recording, maps. The order of their fields matters.
    """
    numbers: dict[int | None, int | None] = {None: None}
    state = sha256()
    for batch in batches:
        plain = [dict(msgspec.to_builtins(event)) for event in batch]
        for event in plain:
            if "block_hashes" in event:
                event["block_hashes"] = [numbers.setdefault(each, len(numbers)) for each in event["block_hashes"]]
            if "parent_block_hash" in event:
                event["parent_block_hash"] = numbers.setdefault(event["parent_block_hash"], len(numbers))
        state.update(msgspec.json.encode(plain))
    return state.hexdigest()
