"""Remembers what this gateway and its peers sent lately, as a guess at the caches of the endpoints.

Blocks are kept for endpoints whose feed of KV events is partial, stale or missing. Chunks of a prompt's bytes
(`byte_chunks`) are kept for all endpoints, but only of prompts whose token ids are not all known. An engine may have
evicted either since, so they get less credit than blocks in the index. Events that report a removal delete blocks here,
too; an endpoint that has lost everything loses both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from hashlib import sha256
from heapq import nlargest
from typing import Protocol, TypeAlias
from weakref import WeakSet

_MAX_MASKS = 1024

OnSent: TypeAlias = Callable[[str, str, Sequence[int], bool], None]
"""Arguments: endpoint, model, the prompt's hashes, and whether these are of chunks of its bytes."""


class WatchesGone(Protocol):
    """Hears what endpoints lose."""

    def gone(self, pod: str, model: str | None, blocks: Collection[int]) -> None:
        """Endpoint `pod` has removed `blocks` of `model`; without a model it has lost everything."""
        ...


class RoutingHistory:
    """The most recent blocks and chunks sent to each endpoint: at most `max_blocks` of each in total.

    Sending a block again makes it recent again. A prompt's later blocks count as older than its earlier ones, so
    eviction always leaves a prefix of it.

    With `keeps_exact` blocks sent to endpoints with exact feeds are kept too, for when the index is lost.
    """

    def __init__(self, max_blocks: int = 1_000_000, *, keeps_exact: bool = False) -> None:
        self._keeps_exact = keeps_exact
        self._blocks = _Recent(max_blocks)
        self._chunks = _Recent(max_blocks)
        self._masks: dict[str, int] = {}  # model -> mask that distinguishes its blocks from those of others
        self._subscribers: list[OnSent] = []
        self._watches: WeakSet[WatchesGone] = WeakSet()

    def __contains__(self, name: str) -> bool:
        return name in self._blocks.sent or name in self._chunks.sent

    def __len__(self) -> int:
        """Number of remembered blocks, over all endpoints."""
        return self._blocks.count

    @property
    def chunks(self) -> int:
        """Number of remembered chunks, over all endpoints."""
        return self._chunks.count

    def subscribe(self, on_sent: OnSent) -> Callable[[], None]:
        """Call `on_sent` for each prompt of `computed`. Returns a function that unsubscribes."""
        self._subscribers.append(on_sent)
        return lambda: self._subscribers.remove(on_sent)

    def watch_gone(self, watch: WatchesGone) -> None:
        """Have `watch` hear of whatever endpoints lose. It is forgotten when nobody else holds it."""
        self._watches.add(watch)

    def computed(
        self, name: str, model: str, chain: Sequence[int], *, is_exact: bool, chunks: Sequence[int] = ()
    ) -> None:
        """An endpoint has computed a prompt that was sent from here. `is_exact`: its events say all that it holds.

        `chain` are the hashes of the prompt's blocks, `chunks` those of its bytes if not all token ids are known.
        """
        if self._keeps_exact or not is_exact:
            self.record_sent(name, model, chain)
        elif name in self._blocks.sent:
            self._blocks.forget(name)
        if chunks:
            self.record_sent(name, model, chunks, by_bytes=True)

    def record_sent(self, name: str, model: str, hashes: Sequence[int], *, by_bytes: bool = False) -> None:
        """Record a prompt that this gateway sent to endpoint `name`, which has computed it."""
        self.record_reported(name, model, hashes, by_bytes=by_bytes)
        for on_sent in self._subscribers:
            on_sent(name, model, hashes, by_bytes)

    def record_reported(self, name: str, model: str, hashes: Sequence[int], *, by_bytes: bool = False) -> None:
        """Record a prompt that a peer sent to endpoint `name`, which has computed it. Subscribers are not called."""
        recent = self._chunks if by_bytes else self._blocks
        recent.record(name, hashes, self._mask(model))

    def match(self, name: str, model: str, chain: Sequence[int]) -> int:
        """How many blocks of a prompt, consecutive from its start, were sent to the endpoint lately."""
        return self._blocks.match(name, chain, self._mask(model)) if name in self._blocks.sent else 0

    def match_chunks(self, name: str, model: str, chunks: Sequence[int]) -> int:
        """How many chunks of a prompt's bytes, consecutive from its start, were sent to the endpoint lately."""
        return self._chunks.match(name, chunks, self._mask(model)) if name in self._chunks.sent else 0

    def drop(self, name: str, model: str, blocks: Collection[int]) -> None:
        """Forget `blocks` of an endpoint, whose events report that it has removed them."""
        if name in self._blocks.sent:
            self._blocks.drop(name, blocks, self._mask(model))
        for watch in self._watches:
            watch.gone(name, model, blocks)

    def forget(self, name: str) -> None:
        """Forget everything about an endpoint: its cache is empty, or it has gone."""
        self._blocks.forget(name)
        self._chunks.forget(name)
        for watch in self._watches:
            watch.gone(name, None, ())

    def _mask(self, model: str) -> int:
        mask = self._masks.get(model)
        if mask is None:
            if len(self._masks) >= _MAX_MASKS:
                self._masks.clear()
            mask = self._masks[model] = int.from_bytes(sha256(model.encode()).digest()[:8], "big")
        return mask


class _Recent:
    """Hashes sent to each endpoint, at most `most` in total.

    Beyond that bound, the endpoint with the most hashes loses its oldest ones. `mask` tells models apart.
    """

    def __init__(self, most: int) -> None:
        self.sent: dict[str, OrderedDict[int, None]] = {}  # endpoint -> hashes, oldest first
        self.count = 0
        self._most = most

    def record(self, name: str, hashes: Sequence[int], mask: int) -> None:
        if not hashes:
            return
        known = self.sent.setdefault(name, OrderedDict())
        before = len(known)
        for each in reversed(hashes[: self._most]):
            known[each ^ mask] = None
            known.move_to_end(each ^ mask)
        self.count += len(known) - before
        while self.count > self._most:
            self._evict()

    def match(self, name: str, hashes: Sequence[int], mask: int) -> int:
        known, count = self.sent[name], 0
        for each in hashes:
            if each ^ mask not in known:
                break
            count += 1
        return count

    def drop(self, name: str, hashes: Iterable[int], mask: int) -> None:
        known = self.sent[name]
        before = len(known)
        for each in hashes:
            known.pop(each ^ mask, None)
        self.count += len(known) - before
        if not known:
            del self.sent[name]

    def forget(self, name: str) -> None:
        self.count -= len(self.sent.pop(name, ()))

    def _evict(self) -> None:
        """Drop the oldest hashes of the endpoint that has the most: down to the bound, or to the next largest endpoint."""
        most, *others = nlargest(2, self.sent.values(), key=len)
        ahead = len(most) - len(others[0]) if others else len(most)
        count = min(self.count - self._most, max(ahead, len(most) // 16, 1))
        for _ in range(count):
            most.popitem(last=False)
        self.count -= count
