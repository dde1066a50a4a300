"""Remembers the blocks that this gateway and its peers sent lately, as a guess at the caches of the endpoints.

The guess is used for endpoints whose feed of KV events is partial, stale or missing. An engine may have evicted the
blocks since, so they get less credit than blocks in the index. Events that report a removal delete blocks here, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from heapq import nlargest
from typing import TypeAlias

_MAX_MASKS = 1024

OnSent: TypeAlias = Callable[[str, str, Sequence[int]], None]
"""Arguments: endpoint, model, and the prompt's block hashes."""


class RoutingHistory:
    """The most recent blocks sent to each endpoint: at most `max_blocks` in total.

    Beyond that bound, the endpoint with the most blocks loses its oldest ones. Sending a block again makes it recent
    again. A prompt's later blocks count as older than its earlier ones, so eviction always leaves a prefix of it.

    With `keeps_exact` blocks sent to endpoints with exact feeds are kept too, for when the index is lost.
    """

    def __init__(self, max_blocks: int = 1_000_000, *, keeps_exact: bool = False) -> None:
        self._max_blocks = max_blocks
        self._keeps_exact = keeps_exact
        self._sent: dict[str, OrderedDict[int, None]] = {}  # endpoint -> blocks, oldest first
        self._blocks = 0
        self._masks: dict[str, int] = {}  # model -> mask that distinguishes its blocks from those of others
        self._subscribers: list[OnSent] = []

    def __contains__(self, name: str) -> bool:
        return name in self._sent

    def __len__(self) -> int:
        """Number of remembered blocks, over all endpoints."""
        return self._blocks

    def subscribe(self, on_sent: OnSent) -> Callable[[], None]:
        """Call `on_sent(name, model, chain)` for each prompt of `record_sent`. Returns a function that unsubscribes."""
        self._subscribers.append(on_sent)
        return lambda: self._subscribers.remove(on_sent)

    def computed(self, name: str, model: str, chain: Sequence[int], *, is_exact: bool) -> None:
        """An endpoint has computed a prompt that was sent from here. `is_exact`: its events say all that it holds."""
        if self._keeps_exact or not is_exact:
            self.record_sent(name, model, chain)
        elif name in self:
            self.forget(name)

    def record_sent(self, name: str, model: str, chain: Sequence[int]) -> None:
        """Record a prompt that this gateway sent to endpoint `name`, which has computed it."""
        self.record_reported(name, model, chain)
        for on_sent in self._subscribers:
            on_sent(name, model, chain)

    def record_reported(self, name: str, model: str, chain: Sequence[int]) -> None:
        """Record a prompt that a peer sent to endpoint `name`, which has computed it. Subscribers are not called."""
        if not chain:
            return
        blocks, mask = self._sent.setdefault(name, OrderedDict()), self._mask(model)
        before = len(blocks)
        for block in reversed(chain[: self._max_blocks]):
            blocks[block ^ mask] = None
            blocks.move_to_end(block ^ mask)
        self._blocks += len(blocks) - before
        while self._blocks > self._max_blocks:
            self._evict()

    def match(self, name: str, model: str, chain: Sequence[int]) -> int:
        """How many blocks of a prompt, consecutive from its start, were sent to the endpoint lately."""
        blocks = self._sent.get(name)
        if not blocks:
            return 0
        mask, count = self._mask(model), 0
        for block in chain:
            if block ^ mask not in blocks:
                break
            count += 1
        return count

    def drop(self, name: str, model: str, blocks: Iterable[int]) -> None:
        """Forget `blocks` of an endpoint, whose events report that it has removed them."""
        known = self._sent.get(name)
        if known:
            mask, before = self._mask(model), len(known)
            for block in blocks:
                known.pop(block ^ mask, None)
            self._blocks += len(known) - before
            if not known:
                del self._sent[name]

    def forget(self, name: str) -> None:
        """Forget all blocks of an endpoint: its cache is empty, its events report every block, or it has gone."""
        self._blocks -= len(self._sent.pop(name, ()))

    def _evict(self) -> None:
        """Drop the oldest blocks of the endpoint that has the most: down to the bound, or to the next largest endpoint."""
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
