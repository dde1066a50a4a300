"""Tokenizing only what is new: pieces of text and beginnings of prompts that were seen before.

A text is cut where that changes no ids (`segments`), and the ids of every piece are remembered by its content. So a
conversation that has grown by a turn costs the new turn, and a system prompt is tokenized once.

What prompts begin with is remembered too, as a tree of pieces, with the block hashes that were computed along each path.
A text is followed down that tree by comparing it in place, which takes 2 µs for 4 KiB.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from matrixinfer.blocks import SharedHashes, TokenIds
from matrixinfer.prompt.segments import Cutter

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

NO_TOKENS: TokenIds = np.empty(0, dtype=np.uint32)

_ENTRY_BYTES = 400
"""What an entry takes beside its text, ids and hashes: objects, a place in a dict."""
_HASH_BYTES = 44
"""A block hash in a list: a Python integer and its pointer."""
_SAMPLE_CHARS = 32
_PLACES = 4
"""Pieces after the same path that look alike in their samples and are remembered nevertheless."""

_Key = tuple[int, str, int]
"""The number of the path before a beginning, a sample of its last piece, and the place among those that look alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Counts since the start, and what is held now."""

    hit_chars: int
    """Characters whose ids were remembered."""
    miss_chars: int
    """Characters that were tokenized."""
    bytes: int
    """Memory held, as estimated."""
    entries: int
    evicted: int


class TokenCache:
    """Remembers up to `max_bytes`, least recently used first out. Safe to use from several threads.

    `block_size` is that of the hashes kept for beginnings.
    """

    def __init__(
        self,
        encode_each: Callable[[Sequence[str]], Sequence[TokenIds]],
        cutter: Cutter,
        *,
        block_size: int,
        max_bytes: int,
    ) -> None:
        self._encode_each = encode_each
        self.cutter = cutter
        self._block_size = block_size
        self._pieces: _Lru[str, TokenIds] = _Lru(max_bytes // 2)
        self._beginnings: _Lru[_Key, _Beginning] = _Lru(max_bytes // 2)
        self._numbers = itertools.count(1)
        self._hits = 0
        self._misses = 0
        self._lock = threading.Lock()

    @property
    def stats(self) -> CacheStats:
        """Counts as of now."""
        pieces, beginnings = self._pieces, self._beginnings
        return CacheStats(
            hit_chars=self._hits,
            miss_chars=self._misses,
            bytes=pieces.bytes + beginnings.bytes,
            entries=len(pieces) + len(beginnings),
            evicted=pieces.evicted + beginnings.evicted,
        )

    def encode(
        self, text: str, *, before: TokenIds = NO_TOKENS, after: TokenIds = NO_TOKENS
    ) -> tuple[TokenIds, SharedHashes]:
        """The ids of `text` between `before` and `after`, shape (n,), and the block hashes known of their beginning.

        The list is meant to be extended as further blocks are hashed; prompts to come profit from it. `before` must be
        the same whenever it is not empty. Raises what `encode_each` raises.
        """
        key = (0, "", 0)
        root = _Beginning(key=key, before=key, number=-1 if len(before) else 0, text="", ids=before, tokens=len(before))
        with self._lock:
            path = self._follow(root, text)
            texts = self.cutter.cut(text, sum(len(each.text) for each in path))
            found = [self._pieces.get(each) for each in texts]
        missing = list(dict.fromkeys(each for each, ids in zip(texts, found, strict=True) if ids is None))
        new = dict(zip(missing, self._encode_each(missing), strict=True))
        pieces = [new[each] if ids is None else ids for each, ids in zip(texts, found, strict=True)]
        ids = np.concatenate([*(each.ids for each in path), *pieces, after])
        with self._lock:
            for each in missing:
                self._pieces.put(each, new[each], _bytes(each, new[each]))
            missed = sum(map(len, missing))
            self._misses += missed
            self._hits += len(text) - missed
            # The last piece ends where the text does, not at a cut.
            return ids, self._remember(path, list(zip(texts[:-1], pieces, strict=False)))

    def _follow(self, root: _Beginning, text: str) -> list[_Beginning]:
        """The remembered beginnings of `text`, each a piece longer than the one before."""
        path = [root]
        start = 0
        while found := self._next(path[-1], text, start):
            path.append(found)
            start += len(found.text)
        return path

    def _next(self, last: _Beginning, text: str, start: int) -> _Beginning | None:
        """The remembered beginning that goes on after `last` as `text` does from `start` on."""
        sample = self._sample(text, start)
        for place in range(_PLACES):
            found = self._beginnings.get((last.number, sample, place))
            if found is None:
                return None
            if text.startswith(found.text, start):
                return found if self.cutter.cuts(text, start + len(found.text)) else None
        return None

    def _sample(self, text: str, start: int) -> str:
        """What tells most pieces apart: their first characters, and the last of those that each of them has."""
        stop = start + self.cutter.shortest
        return text[start : min(start + _SAMPLE_CHARS, stop)] + text[max(start, stop - _SAMPLE_CHARS) : stop]

    def _remember(self, path: list[_Beginning], pieces: Sequence[tuple[str, TokenIds]]) -> SharedHashes:
        """Go on from `path` with `pieces`. Returns the block hashes known, which all beginnings on the way now share."""
        known = path[-1].hashes[: path[-1].tokens // self._block_size]
        for i, (text, ids) in enumerate(pieces):
            last, sample = path[-1], self._sample(text, 0)
            place = 0 if i else self._place(last, sample)  # nothing else follows what is new itself
            tokens = last.tokens + len(ids)
            key, number = (last.number, sample, place), next(self._numbers)
            path.append(_Beginning(key=key, number=number, text=text, ids=ids, tokens=tokens, before=last.key))
        hashes = SharedHashes(known, limit=path[-1].tokens // self._block_size)
        for each in reversed(path[1:]):  # so that those which lead to others stay longer
            each.hashes = hashes
            if self._beginnings.get(each.key) is not each:
                size = _bytes(each.text, each.ids) + len(each.ids) // self._block_size * _HASH_BYTES
                for evicted in self._beginnings.put(each.key, each, size):
                    self._shorten(evicted)
        return hashes

    def _shorten(self, evicted: _Beginning) -> None:
        """What leads to an evicted beginning keeps no hashes beyond its own."""
        shared, before = evicted.hashes, self._beginnings.peek(evicted.before)
        kept = shared[: before.tokens // self._block_size] if before is not None else []
        while before is not None and before.hashes is shared:
            before.hashes = kept
            before = self._beginnings.peek(before.before)

    def _place(self, last: _Beginning, sample: str) -> int:
        """A free place for a beginning after `last`, or any."""
        free = (place for place in range(_PLACES) if self._beginnings.get((last.number, sample, place)) is None)
        return next(free, next(self._numbers) % _PLACES)


@dataclass(slots=True, kw_only=True, eq=False)
class _Beginning:
    """A path of pieces from a prompt's start, of which this is the last."""

    key: _Key
    number: int
    text: str
    ids: TokenIds
    tokens: int
    """Of the whole path."""
    before: _Key
    """That of the path before; its own at a root."""
    hashes: list[int] = field(default_factory=list)
    """Begins with the hashes of the path's blocks, as far as they are known."""


def _bytes(text: str, ids: TokenIds) -> int:
    return sys.getsizeof(text) + ids.nbytes


class _Lru(Generic[K, V]):
    """A dict of bounded cost, least recently used first out."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.bytes = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def peek(self, key: K) -> V | None:
        """As `get`, without making it young."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def put(self, key: K, value: V, size: int) -> list[V]:
        """Keep `value`, which takes `size` bytes and the entry itself; one that is too large is not kept.

        Returns what had to go for it.
        """
        cost = size + _ENTRY_BYTES
        if cost > self._max_bytes:
            return []
        gone = []
        old = self._entries.pop(key, None)
        if old is not None:
            gone.append(old[0])
            self.bytes -= old[1]
        self._entries[key] = value, cost
        self.bytes += cost
        while self.bytes > self._max_bytes:
            _, (value, freed) = self._entries.popitem(last=False)
            gone.append(value)
            self.bytes -= freed
            self.evicted += 1
        return gone
