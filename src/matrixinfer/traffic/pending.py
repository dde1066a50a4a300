"""The blocks that requests bring to one pod: pending from the time when they are sent until events have reported them."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Pending:
    """The pending blocks of one model at one pod: of requests in flight, and fading ones of requests that have ended."""

    __slots__ = ("_ends", "_fading", "_held", "_until", "key")

    def __init__(self, key: tuple[str, str], *, has_ends: bool = True) -> None:
        self.key = key
        self._ends = Pending(key, has_ends=False) if has_ends else None
        """The last block of each request."""
        self._held: dict[int, int] = {}
        self._fading: dict[int, float] = {}
        self._until = float("-inf")

    @property
    def empty(self) -> bool:
        """Whether no block is left."""
        return not self._held and not self._fading

    def add(self, blocks: list[int]) -> None:
        """Add the blocks of one request, in the order of its prompt."""
        held = self._held
        for block in blocks:
            held[block] = held.get(block, 0) + 1
        if self._ends is not None:
            self._ends.add(blocks[-1:])

    def release(self, blocks: list[int]) -> None:
        """Remove one request's `blocks`; they do not fade."""
        held = self._held
        for block in blocks:
            if held[block] > 1:
                held[block] -= 1
            else:
                del held[block]
        if self._ends is not None:
            self._ends.release(blocks[-1:])

    def fade(self, blocks: list[int], until: float) -> None:
        """Remove one request's `blocks`, which stay pending until `until`. `until` must not decrease between calls."""
        held = self._held
        for block in blocks:
            if held[block] > 1:
                held[block] -= 1
            else:
                del held[block]
                self._fading[block] = until
        self._until = until
        if self._ends is not None:
            self._ends.fade(blocks[-1:], until)

    def drop(self, blocks: list[int], until: float) -> None:
        """Delete those of `blocks` that expire at `until`, and not later because another request brought them."""
        for block in blocks:
            if self._fading.get(block) == until:
                del self._fading[block]
        if self._ends is not None:
            self._ends.drop(blocks[-1:], until)

    def gone(self, blocks: Collection[int] | None = None) -> None:
        """The pod has removed `blocks`, or all: those that no request in flight brings are not pending any more."""
        fading = self._fading
        if blocks is None:
            fading.clear()
        elif fading:
            for block in blocks:
                fading.pop(block, None)
        if self._ends is not None:
            self._ends.gone(blocks)

    def ends_within(self, hashes: Sequence[int], start: int, count: int, now: float) -> int:
        """How many of `count` pending blocks from `start` on there are up to the last one that ends a request."""
        ends = self._ends
        if ends is None:
            return 0
        return next((n for n in range(count, 0, -1) if ends.count(hashes[start + n - 1 : start + n], 0, now)), 0)

    def count(self, hashes: Sequence[int], start: int, now: float) -> int:
        """How many consecutive blocks from position `start` on are pending; reads `hashes` only as far as needed."""
        fading = self._fading if self._until > now else {}
        if not self._held and not fading:
            return 0

        def is_pending(position: int) -> bool:
            block = hashes[position]
            return block in self._held or fading.get(block, now) > now

        if start >= len(hashes) or not is_pending(start):
            return 0
        # Requests bring whole chains, so the pending blocks normally form one run. (If the index has since lost blocks
        # that an earlier request built on, there may be gaps, and the result is an estimate.) Exponential search for
        # the end of the run, then bisection.
        last, step, end = start, 1, len(hashes)
        while last + step < end and is_pending(last + step):
            last += step
            step *= 2
        end = min(end, last + step)
        while end - last > 1:
            middle = (last + end) // 2
            if is_pending(middle):
                last = middle
            else:
                end = middle
        return end - start
