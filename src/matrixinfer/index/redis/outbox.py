"""The blocks that one pod holds, and the changes that are not yet written to Redis, in order. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Sign: TypeAlias = Literal["+", "-"]


@dataclass(frozen=True, slots=True)
class Change:
    """Blocks to add (`+`) or to remove (`-`)."""

    model: str
    sign: Sign
    blocks: list[int]


class Clear:
    """Remove all blocks of the pod."""


CLEAR = Clear()


class Outbox:
    """The outbox of one pod, for at most `bound` unwritten blocks.

    Beyond that bound, unwritten changes are dropped and `overflowed` is set: all blocks must then be written again.
    """

    def __init__(self, bound: int) -> None:
        self.overflowed = False
        self._bound = bound
        self._held: dict[str, dict[int, None]] = {}
        self._changes: deque[Change | Clear] = deque()
        self._waiting = 0

    def __len__(self) -> int:
        """Number of blocks that the pod holds, counted per model."""
        return sum(map(len, self._held.values()))

    @property
    def waiting(self) -> int:
        """Number of unwritten blocks; at least 1 if there is any unwritten change."""
        return max(self._waiting, bool(self._changes))

    @property
    def held(self) -> Iterator[tuple[str, list[int]]]:
        """The blocks that the pod holds, by model, oldest first."""
        return ((model, list(blocks)) for model, blocks in self._held.items())

    def blocks_of(self, model: str) -> Iterable[int]:
        """The blocks of one model that the pod holds."""
        return self._held.get(model, {}).keys()

    @property
    def models(self) -> list[str]:
        """The models whose blocks the pod holds."""
        return list(self._held)

    def add(self, model: str, hashes: Sequence[int]) -> None:
        """Record that the pod holds `hashes`."""
        held = self._held.get(model, {})
        if held.keys().isdisjoint(hashes):
            new = list(dict.fromkeys(hashes))
        else:
            new = [block for block in dict.fromkeys(hashes) if block not in held]
        if new:
            self._held.setdefault(model, held).update(dict.fromkeys(new))
        self._note(Change(model, "+", new))

    def remove(self, model: str, hashes: Iterable[int]) -> None:
        """Record that the pod no longer holds `hashes`."""
        held = self._held.get(model, {})
        removed = [block for block in hashes if held.pop(block, 0) is None]
        if not held:
            self._held.pop(model, None)
        self._note(Change(model, "-", removed))

    def clear(self) -> None:
        """Record that the pod holds nothing."""
        self._held.clear()
        self._changes.clear()
        self._waiting = 0
        self._changes.append(CLEAR)

    def take(self, count: int) -> list[Change] | Clear | None:
        """Take the next changes: up to `count` blocks, or a clear; None if everything is written."""
        if not self._changes:
            return None
        if isinstance(self._changes[0], Clear):
            self._changes.popleft()
            return CLEAR
        taken: list[Change] = []
        while self._changes and count > 0:
            change = self._changes[0]
            if isinstance(change, Clear):
                break
            self._changes.popleft()
            if len(change.blocks) > count:
                self._changes.appendleft(Change(change.model, change.sign, change.blocks[count:]))
                change = Change(change.model, change.sign, change.blocks[:count])
            count -= len(change.blocks)
            self._waiting -= len(change.blocks)
            taken.append(change)
        return taken

    def put_back(self, taken: list[Change] | Clear) -> None:
        """Return changes that could not be written to the front of the queue."""
        if isinstance(taken, Clear):
            self._changes.appendleft(taken)
            return
        self._changes.extendleft(reversed(taken))
        self._waiting += sum(len(change.blocks) for change in taken)

    def drop(self) -> None:
        """Drop all unwritten changes, because all blocks that the pod holds are about to be written."""
        self._changes.clear()
        self._waiting, self.overflowed = 0, False

    def _note(self, change: Change) -> None:
        if not change.blocks or self.overflowed:
            return
        self._changes.append(change)
        self._waiting += len(change.blocks)
        if self._waiting > self._bound:
            self.drop()
            self.overflowed = True
