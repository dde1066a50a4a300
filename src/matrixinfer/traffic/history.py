"""What this gateway, and others that it hears, have sent to endpoints whose events cannot say all that they hold: a guess at their caches.

It fills in for feeds that are partial, stale or missing. An engine may have evicted what it was sent, so what is remembered
counts for less than what events tell; and events that tell otherwise have it forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from heapq import nlargest


class RoutingHistory:
    """The newest blocks sent to each endpoint; at most `max_blocks` over all of them: the one with the most gives way.

    Blocks that are sent again are young again, and a prompt's blocks are younger than those that follow them: what
    remains of a prompt is a prefix of it. With `keeps_exact` blocks sent to endpoints with exact feeds are kept too, for
    when the index is lost.
    """

    def __init__(self, max_blocks: int = 1_000_000, *, keeps_exact: bool = False) -> None:
        self._max_blocks = max_blocks
        self._keeps_exact = keeps_exact
        self._sent: dict[str, OrderedDict[int, None]] = {}  # endpoint -> blocks, oldest first
        self._blocks = 0
        self._masks: dict[str, int] = {}  # model -> what tells its blocks from those of others
        self.on_sent: Callable[[str, str, Sequence[int]], None] | None = None
        """Told of each prompt, as `sent` is."""

    def __contains__(self, name: str) -> bool:
        return name in self._sent

    def __len__(self) -> int:
        """Blocks remembered, over all endpoints."""
        return self._blocks

    def computed(self, name: str, model: str, chain: Sequence[int], *, is_exact: bool) -> None:
        """An endpoint has computed a prompt that was sent from here. `is_exact`: its events say all that it holds."""
        if self._keeps_exact or not is_exact:
            self.sent(name, model, chain)
        elif name in self:
            self.forget(name)

    def sent(self, name: str, model: str, chain: Sequence[int]) -> None:
        """An endpoint has computed a prompt that was sent from here."""
        self.heard(name, model, chain)
        if self.on_sent is not None:
            self.on_sent(name, model, chain)

    def heard(self, name: str, model: str, chain: Sequence[int]) -> None:
        """An endpoint has computed a prompt."""
        if not chain:
            return
        blocks, mask = self._sent.setdefault(name, OrderedDict()), self._mask(model)
        before = len(blocks)
        for block in reversed(chain[: self._max_blocks]):
            blocks[block ^ mask] = None
            blocks.move_to_end(block ^ mask)
        self._blocks += len(blocks) - before
        while self._blocks > self._max_blocks:
            self._give_way()

    def match(self, name: str, model: str, chain: Sequence[int]) -> int:
        """How many blocks of a prompt, consecutive from its start, the endpoint was sent and may still hold."""
        blocks = self._sent.get(name)
        if not blocks:
            return 0
        mask, count = self._mask(model), 0
        for block in chain:
            if block ^ mask not in blocks:
                break
            count += 1
        return count

    def refuted(self, name: str, model: str, blocks: Iterable[int]) -> None:
        """The endpoint's events tell that it has dropped `blocks`."""
        known = self._sent.get(name)
        if known:
            mask, before = self._mask(model), len(known)
            for block in blocks:
                known.pop(block ^ mask, None)
            self._blocks += len(known) - before
            if not known:
                del self._sent[name]

    def forget(self, name: str) -> None:
        """The endpoint holds nothing, tells all that it holds, or is gone."""
        self._blocks -= len(self._sent.pop(name, ()))

    def _give_way(self) -> None:
        """Drop the oldest blocks of the endpoint that has the most: what is too much, or until another one has more."""
        most, *others = nlargest(2, self._sent.values(), key=len)
        ahead = len(most) - len(others[0]) if others else len(most)
        count = min(self._blocks - self._max_blocks, max(ahead, len(most) // 16, 1))
        for _ in range(count):
            most.popitem(last=False)
        self._blocks -= count

    def _mask(self, model: str) -> int:
        mask = self._masks.get(model)
        if mask is None:
            if len(self._masks) >= _MAX_MASKS:
                self._masks.clear()
            mask = self._masks[model] = int.from_bytes(sha256(model.encode()).digest()[:8], "big")
        return mask


_MAX_MASKS = 1024
