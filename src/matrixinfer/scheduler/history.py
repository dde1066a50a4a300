"""What this gateway, and others that it hears, have sent to endpoints whose events cannot say all that they hold: a guess at their caches.

It fills in for feeds that are partial, stale or missing. An engine may have evicted what it was sent, so what is remembered
counts for less than what events tell; and events that tell otherwise have it forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256


class RoutingHistory:
    """The newest blocks sent to each endpoint; at most `max_blocks` over all of them, in equal shares.

    Blocks that are sent again are young again, and a prompt's blocks are younger than those that follow them: what
    remains of a prompt is a prefix of it.
    """

    def __init__(self, max_blocks: int = 1_000_000) -> None:
        self._max_blocks = max_blocks
        self._sent: dict[str, dict[int, None]] = {}  # endpoint -> blocks, oldest first
        self._masks: dict[str, int] = {}  # model -> what tells its blocks from those of others
        self.on_sent: Callable[[str, str, Sequence[int]], None] | None = None
        """Told of each prompt, as `sent` is."""

    def __contains__(self, name: str) -> bool:
        return name in self._sent

    def __len__(self) -> int:
        """Blocks remembered, over all endpoints."""
        return sum(map(len, self._sent.values()))

    def sent(self, name: str, model: str, chain: Sequence[int]) -> None:
        """An endpoint has computed a prompt that was sent from here."""
        self.heard(name, model, chain)
        if self.on_sent is not None:
            self.on_sent(name, model, chain)

    def heard(self, name: str, model: str, chain: Sequence[int]) -> None:
        """An endpoint has computed a prompt."""
        if not chain:
            return
        blocks, mask = self._sent.setdefault(name, {}), self._mask(model)
        share = max(1, self._max_blocks // len(self._sent))
        for block in reversed(chain[:share]):
            blocks.pop(block ^ mask, None)
            blocks[block ^ mask] = None
        for oldest in list(blocks)[: max(0, len(blocks) - share)]:
            del blocks[oldest]

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
            mask = self._mask(model)
            for block in blocks:
                known.pop(block ^ mask, None)

    def forget(self, name: str) -> None:
        """The endpoint holds nothing, tells all that it holds, or is gone."""
        self._sent.pop(name, None)

    def _mask(self, model: str) -> int:
        mask = self._masks.get(model)
        if mask is None:
            if len(self._masks) >= _MAX_MASKS:
                self._masks.clear()
            mask = self._masks[model] = int.from_bytes(sha256(model.encode()).digest()[:8], "big")
        return mask


_MAX_MASKS = 1024
