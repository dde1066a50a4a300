"""Real objects with values that a test chooses, and an engine without sockets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from matrixinfer.scheduler.framework import Candidate, SchedulingRequest, Services
from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, Event, EventBatch, encode
from matrixinfer.sim.sequence import Sequence as EngineSequence


class FakeClock:
    """A clock that moves only with `advance`. Call it for the time in seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass. Raises `ValueError` for a negative number: a monotonic clock never goes back."""
        if seconds < 0:
            raise ValueError(f"expected a number that is not negative, got {seconds}")
        self.now += seconds


def services(clock: FakeClock | None = None, *, seed: int = 0) -> Services:
    """What the scheduler lends to plugins, with a fake clock and a seeded generator."""
    return Services(clock=clock or FakeClock(), rng=random.Random(seed))  # noqa: S311 - breaks ties, protects nothing


def request(**fields: Any) -> SchedulingRequest:
    """A request of 512 tokens in four blocks; `fields` replace any of its fields."""
    given: dict[str, Any] = {
        "id": "test",
        "model": "model",
        "prompt_tokens": 512,
        "block_size": 128,
        "chain": (11, 12, 13, 14),
        "prefix": b"a prompt",
    }
    return SchedulingRequest(**(given | fields))


def candidate(name: str = "pod-a", **fields: Any) -> Candidate:
    """A pod; everything but `fields` is unknown."""
    return Candidate(**({"name": name, "url": f"http://{name}:8000"} | fields))


class FakeEngine:
    """Publishes the KV events that vLLM would, as frames: pairs of number and payload, for `Index.apply`.

    It caches what `store` is given, in blocks of `block_size` tokens, and keeps all its frames for replays.
    """

    def __init__(self, block_size: int = 16) -> None:
        self.block_size = block_size
        self.frames: list[tuple[int, bytes]] = []
        """Every frame published so far."""
        self._present: set[int] = set()
        self._time = 0.0

    def store(self, token_ids: Sequence[int], *, salt: str | None = None) -> tuple[int, bytes]:
        """Compute a prompt: its full blocks that are not cached yet are stored."""
        sequence = self._sequence(token_ids, salt)
        events: list[Event] = []
        for is_new, group in groupby(enumerate(sequence.hashes), lambda each: each[1] not in self._present):
            positions = [position for position, _ in group]
            if is_new:
                events.append(sequence.stored_event(positions[0], positions[-1] + 1))
        self._present.update(sequence.hashes)
        return self._publish(events)

    def evict(self, token_ids: Sequence[int], *, keep: int = 0, salt: str | None = None) -> tuple[int, bytes]:
        """Drop the blocks of a prompt, except the first `keep`; the last block goes first."""
        names = [name for name in self._sequence(token_ids, salt).hashes[keep:] if name in self._present][::-1]
        self._present.difference_update(names)
        return self._publish([BlockRemoved(block_hashes=[name]) for name in names])

    def clear(self) -> tuple[int, bytes]:
        """Drop every block."""
        self._present.clear()
        return self._publish([AllBlocksCleared()])

    def held(self, token_ids: Sequence[int], *, salt: str | None = None) -> int:
        """Blocks of a prompt that are cached, consecutive from its start."""
        names = self._sequence(token_ids, salt).hashes
        return next((i for i, name in enumerate(names) if name not in self._present), len(names))

    def since(self, start: int) -> Sequence[tuple[int, bytes]]:
        """The answer to a replay from number `start` on."""
        return self.frames[start:]

    def restart(self) -> None:
        """Begin again with an empty cache, and number frames from 0."""
        self._present.clear()
        self.frames = []

    def _sequence(self, token_ids: Sequence[int], salt: str | None) -> EngineSequence:
        return EngineSequence(np.array(token_ids, dtype=np.uint32), self.block_size, salt)

    def _publish(self, events: list[Event]) -> tuple[int, bytes]:
        self._time += 1.0  # no two frames are alike, also after a restart
        frame = (len(self.frames), encode(EventBatch(self._time, events)))
        self.frames.append(frame)
        return frame
