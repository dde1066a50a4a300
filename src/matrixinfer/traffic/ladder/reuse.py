"""How far back each block of a prompt was last used, in blocks: an LRU stack, sampled by hash within a bound.

A fixed share of the blocks, chosen by their hashes, stands for all of them, as in SHARDS (Waldspurger et al., FAST 2015): the
distances between sampled blocks, divided by that share, estimate the distances between all. The share halves whenever the
tracker is full or has too much to do. A request touches its blocks all at once, its last block first, as engines do when they free them, so one
entry in the stack stands for all blocks that one request touched last. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

ALL = 1 << 63
"""Hashes are below this."""
_FULL = 0.75
"""A full tracker keeps at most this share of its blocks."""
_PERIOD_SECONDS = 10.0
MOST_TOUCHED = 50_000
"""Sampled blocks that requests touch in a period, beyond which fewer are sampled: some 2 ms of work per second."""
_ONE_VISIT_SECONDS = 0.1
"""Blocks that an endpoint stores within this time are remembered together."""


class Visit:
    """The blocks that one request touched last, of those that no later request has touched."""

    __slots__ = ("at", "blocks", "endpoint", "number")

    def __init__(self, number: int, at: float, endpoint: str) -> None:
        self.number = number
        """Rises with time."""
        self.at = at
        self.endpoint = endpoint
        """Where it was computed."""
        self.blocks = 0


class Reused(NamedTuple):
    """Sampled blocks of a prompt that were last touched together. Their distances rise by one sampled block each."""

    nearer: int
    """Sampled blocks that were touched since the first of these was, without itself."""
    blocks: int
    last: Visit


class Found(NamedTuple):
    """The blocks of a prompt from a position on, in sampled blocks."""

    blocks: int
    """How many were sampled."""
    reused: Sequence[Reused]
    """Those that were seen before."""
    rate: float
    """Share of all blocks that are sampled."""
    different: int
    """How many sampled blocks are remembered."""


class ReuseTracker:
    """Remembers at most `most` blocks: those touched last, of the share that is sampled.

    When it is full it forgets blocks that nobody has touched for `horizon` seconds, and halves the share if need be. So it
    does when requests touch more than `most_touched` sampled blocks within ten seconds. Every `now` is in seconds and must
    not decrease.
    """

    def __init__(
        self, most: int = 16_384, *, horizon: float = float("inf"), most_touched: float = MOST_TOUCHED
    ) -> None:
        self._most = most
        self._horizon = horizon
        self._most_touched = most_touched
        self._limit = ALL
        self._known: dict[int, tuple[Visit, float]] = {}  # block -> last touched by, first seen at
        self._sums = _Sums(2 * most)
        self._visits: dict[int, Visit] = {}  # by number, oldest first
        self._next = 1
        self._period = 0.0  # when it began
        self._touched = 0  # blocks in it

    def __len__(self) -> int:
        """Number of blocks remembered."""
        return len(self._known)

    @property
    def rate(self) -> float:
        """Share of all blocks that are sampled."""
        return self._limit / ALL

    def visit(
        self, hashes: Sequence[int], start: int, stop: int, *, mask: int = 0, since: float, now: float, endpoint: str
    ) -> Found:
        """Look at the blocks of a prompt at the positions [start, stop), and touch all of `hashes`.

        A block counts as seen if that was before `since`, when the request was decided. `mask` tells the blocks of models
        apart that share caches.
        """
        limit, known, rate = self._limit, self._known, self.rate
        keys = [each ^ mask for each in hashes] if mask else hashes
        sampled = [(at, key) for at, key in enumerate(keys) if key < limit]
        different = len(known)
        if not sampled:
            return Found(0, (), rate, different)
        visit, blocks = self._visit(now, endpoint), 0
        before: dict[Visit, int] = {}
        lost: dict[Visit, int] = {}
        left: dict[Visit, int] = {}
        for at, key in sampled:
            entry = known.get(key)
            blocks += start <= at < stop
            if entry is None:
                known[key] = visit, since
                continue
            last, first = entry
            known[key] = visit, min(first, since)
            left[last] = left.get(last, 0) + 1
            if at < start:
                before[last] = before.get(last, 0) + 1
            elif at < stop and first < since:
                lost[last] = lost.get(last, 0) + 1
        reused = [
            Reused(different - self._sums.up_to(last.number) + before.get(last, 0), count, last)
            for last, count in lost.items()
        ]
        self._moved(visit, len(sampled), left)
        self._count(len(sampled), now)
        return Found(blocks, reused, rate, different)

    def introduce(self, hashes: Sequence[int], *, mask: int = 0, now: float, endpoint: str) -> None:
        """An endpoint has stored blocks. Those that are new here, such as replies, are remembered as if touched now."""
        limit, known = self._limit, self._known
        keys = [each ^ mask for each in hashes] if mask else hashes
        new = {key for key in keys if key < limit and key not in known}
        if new:
            last = next(reversed(self._visits.values()), None)
            is_recent = last is not None and last.endpoint == endpoint and now - last.at < _ONE_VISIT_SECONDS
            visit = last if last is not None and is_recent else self._visit(now, endpoint)
            known.update(dict.fromkeys(new, (visit, now)))
            self._moved(visit, len(new), {})

    def _visit(self, now: float, endpoint: str) -> Visit:
        if self._next > self._sums.size:
            self._renumber()
        visit = Visit(self._next, now, endpoint)
        self._next += 1
        self._visits[visit.number] = visit
        return visit

    def _moved(self, visit: Visit, gained: int, left: Mapping[Visit, int]) -> None:
        """A visit has touched so many blocks, of which so many were those of earlier ones."""
        visit.blocks += gained
        self._sums.put(visit.number, visit.blocks)
        for last, count in left.items():
            last.blocks -= count
            self._sums.put(last.number, last.blocks)
            if not last.blocks:
                del self._visits[last.number]
        if len(self._known) > self._most:
            self._shrink(visit.at)

    def _count(self, touched: int, now: float) -> None:
        """Halve the share if too many blocks are touched."""
        if now - self._period >= _PERIOD_SECONDS:
            self._period, self._touched = now, 0
        self._touched += touched
        if self._touched > self._most_touched and self._limit > 1:
            self._limit //= 2
            self._touched = 0
            self._keep({key: entry for key, entry in self._known.items() if key < self._limit})

    def _shrink(self, now: float) -> None:
        """Forget blocks that are too old, then sample fewer; at last forget the oldest, in case hashes are not even."""
        most, oldest = int(self._most * _FULL), now - self._horizon
        self._known = {key: entry for key, entry in self._known.items() if entry[0].at >= oldest}
        while len(self._known) > most and self._limit > 1:
            self._limit //= 2
            self._known = {key: entry for key, entry in self._known.items() if key < self._limit}
        if len(self._known) > most:
            by_age = sorted(self._known.items(), key=lambda each: each[1][0].number)
            self._known = dict(by_age[-most:])
        self._keep(self._known)

    def _keep(self, known: dict[int, tuple[Visit, float]]) -> None:
        """Remember these blocks only."""
        self._known = known
        for visit in self._visits.values():
            visit.blocks = 0
        for visit, _ in self._known.values():
            visit.blocks += 1
        self._renumber()

    def _renumber(self) -> None:
        """Number the visits that still have blocks from 1 on, in their order."""
        live = [visit for visit in self._visits.values() if visit.blocks]
        self._visits = {}
        for number, visit in enumerate(live, 1):
            visit.number = number
            self._visits[number] = visit
        self._next = len(live) + 1
        self._sums.fill([visit.blocks for visit in live])


class _Sums:
    """Numbers at the positions 1 to `size`, and their sums from the start (a Fenwick tree).

    Changes enter the tree when a sum is asked for: many numbers are set and set back without that.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._values = [0] * (size + 1)
        self._entered = [0] * (size + 1)
        self._changed: set[int] = set()
        self._tree = [0] * (size + 1)

    def put(self, position: int, value: int) -> None:
        """Set one number."""
        self._values[position] = value
        self._changed.add(position)

    def up_to(self, position: int) -> int:
        """Sum of the numbers at the positions 1 to `position`."""
        if self._changed:
            self._enter()
        tree, total = self._tree, 0
        while position:
            total += tree[position]
            position &= position - 1
        return total

    def fill(self, values: Sequence[int]) -> None:
        """Set the first numbers; the others are 0."""
        rest = self.size - len(values)
        self._values = [0, *values, *([0] * rest)]
        self._entered = list(self._values)
        self._changed.clear()
        self._tree = tree = list(self._values)
        for position in range(1, self.size + 1):
            above = position + (position & -position)
            if above <= self.size:
                tree[above] += tree[position]

    def _enter(self) -> None:
        tree, size, values, entered = self._tree, self.size, self._values, self._entered
        for changed in self._changed:
            change, position = values[changed] - entered[changed], changed
            entered[changed] = values[changed]
            while change and position <= size:
                tree[position] += change
                position += position & -position
        self._changed.clear()
