"""Publishes an engine's cache changes as its KV events: encoded frames, numbered, some of them lost, kept for replay."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, encode
from matrixinfer.study.engine import Stored
from matrixinfer.study.jobs import Frame

KEPT_FRAMES = 10_000
"""vLLM's default `buffer_steps`."""


class Publisher:
    """One pod's. `letters_of` gives the letters of a request; `lost` is the share of frames that no gateway gets live."""

    def __init__(
        self, pod: str, letters_of: Callable[[Any, int, int], list[int]], *, delay: float, lost: float, seed: int
    ) -> None:
        self.pod = pod
        self._letters_of = letters_of
        self._delay = delay
        self._lost = lost
        self._rng = random.Random(seed)  # noqa: S311  # a simulation
        self._number = 0
        self._is_first_run = True
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_FRAMES)

    def frame(self, changes: Iterable[Stored | int], now: float) -> Frame | None:
        """The frame of a step's changes; None when it is lost."""
        events: list[Event] = []
        removed: list[int] = []
        for change in changes:
            if isinstance(change, Stored):
                if removed:
                    events.append(BlockRemoved(block_hashes=removed))
                    removed = []
                events.append(self._stored(change))
            else:
                removed.append(change)
        if removed:
            events.append(BlockRemoved(block_hashes=removed))
        return self._frame(events, now)

    def cleared(self, now: float) -> Frame | None:
        """The frame of a reset."""
        return self._frame([AllBlocksCleared()], now)

    @property
    def is_untouched(self) -> bool:
        """Whether it has never published anything."""
        return self._is_first_run and not self._number

    def since(self, start: int) -> list[tuple[int, bytes]]:
        """The frames from a number on, as far as they are kept."""
        found = list(takewhile(lambda each: each[0] >= start, reversed(self._kept)))
        return found[::-1]

    def restart(self) -> None:
        """Another run of the engine: numbers begin again."""
        self._is_first_run = False
        self._number = 0
        self._kept.clear()

    def _stored(self, change: Stored) -> BlockStored:
        job, first, last = change
        return BlockStored(
            block_hashes=job.hashes[first:last],
            parent_block_hash=job.hashes[first - 1] if first else None,
            token_ids=self._letters_of(job, first, last),
            block_size=1,
            extra_keys=[None] * (last - first),
        )

    def _frame(self, events: list[Event], now: float) -> Frame | None:
        number, self._number = self._number, self._number + 1
        payload = encode(EventBatch(ts=now, events=events))
        self._kept.append((number, payload))
        if self._lost and self._rng.random() < self._lost:
            return None
        return Frame(now + self._delay, self.pod, number, payload)
