"""A cache of token ids, so that only new text is tokenized.

A text is cut into pieces at positions where cutting changes no ids (`segments`), and the ids of every piece are cached
by its content. A conversation that has grown by one turn costs only the new turn; a system prompt is tokenized once.

The beginnings of prompts are cached too, as a tree of pieces with the block hashes computed along each path. A lookup
walks down that tree by comparing the text in place, which takes 2 µs for 4 KiB.
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
from matrixinfer.prompt.bounds import TooMuch
from matrixinfer.prompt.effort import check
from matrixinfer.prompt.segments import Cutter

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

NO_TOKENS: TokenIds = np.empty(0, dtype=np.uint32)

_ENTRY_BYTES = 400
"""Memory of an entry besides its text, ids and hashes: objects and a slot in a dict."""
_HASH_BYTES = 44
"""Memory of a block hash in a list: a Python integer and its pointer."""
_BATCH_CHARS = 256 * 1024
MAX_PIECE_CHARS = 1024 * 1024
"""Longer pieces are not encoded: that cannot be interrupted, and takes half a second for so many letters without a blank."""
_SAMPLE_CHARS = 32
_PLACES = 4
"""How many pieces with the same sample are kept after the same path."""

_Key = tuple[int, str, int]
"""The number of the preceding path, a sample of the last piece, and a place among pieces with the same sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Counters since the start, and the current size."""

    hit_chars: int
    """Characters whose ids came from the cache."""
    miss_chars: int
    """Characters that were tokenized."""
    bytes: int
    """Estimated memory in use."""
    entries: int
    evicted: int


class TokenCache:
    """Caches up to `max_bytes` and evicts the least recently used entries. Thread-safe.

    `block_size` is the block size, in tokens, of the hashes that are cached for beginnings.
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
        self._pieces: Lru[str, TokenIds] = Lru(max_bytes // 2)
        self._beginnings: Lru[_Key, _Beginning] = Lru(max_bytes // 2)
        self._numbers = itertools.count(1)
        self._hits = 0
        self._misses = 0
        self._lock = threading.Lock()

    @property
    def stats(self) -> CacheStats:
        """The current counters."""
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
        """The ids of `text` between `before` and `after`, shape (n,), and the known block hashes of their beginning.

        The caller extends the list of hashes as it hashes further blocks; later prompts then reuse them. `before` must
        be the same in every call in which it is not empty. Raises what `encode_each` raises, and `TooMuch`.
        """
        key = (0, "", 0)
        root = _Beginning(key=key, before=key, number=-1 if len(before) else 0, text="", ids=before, tokens=len(before))
        with self._lock:
            path = self._follow(root, text)
            texts = self.cutter.cut(text, sum(len(each.text) for each in path))
            found = [self._pieces.get(each) for each in texts]
        missing = list(dict.fromkeys(each for each, ids in zip(texts, found, strict=True) if ids is None))
        new = dict(zip(missing, self._encoded(missing), strict=True))
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

    def _encoded(self, texts: Sequence[str]) -> list[TokenIds]:
        """The ids of each text. Between some of them it is asked whether they are still wanted. Raises `TooMuch`."""
        longest = max(map(len, texts), default=0)
        if longest > MAX_PIECE_CHARS:
            raise TooMuch(f"{longest} characters in a row cannot be cut, which is more than {MAX_PIECE_CHARS}")
        encoded: list[TokenIds] = []
        start = stop = 0
        while start < len(texts):
            chars = 0
            while stop < len(texts) and chars < _BATCH_CHARS:
                chars += len(texts[stop])
                stop += 1
            if start:
                check()
            encoded += self._encode_each(texts[start:stop])
            start = stop
        return encoded

    def _follow(self, root: _Beginning, text: str) -> list[_Beginning]:
        """The cached beginnings of `text`, each one piece longer than the one before."""
        path = [root]
        start = 0
        while found := self._next(path[-1], text, start):
            path.append(found)
            start += len(found.text)
        return path

    def _next(self, last: _Beginning, text: str, start: int) -> _Beginning | None:
        """The cached beginning that continues `last` the way `text` continues at `start`."""
        sample = self._sample(text, start)
        for place in range(_PLACES):
            found = self._beginnings.get((last.number, sample, place))
            if found is None:
                return None
            if text.startswith(found.text, start):
                return found if self.cutter.cuts(text, start + len(found.text)) else None
        return None

    def _sample(self, text: str, start: int) -> str:
        """A short key that distinguishes most pieces: the first characters, and the last within the shortest length."""
        stop = start + self.cutter.shortest
        return text[start : min(start + _SAMPLE_CHARS, stop)] + text[max(start, stop - _SAMPLE_CHARS) : stop]

    def _remember(self, path: list[_Beginning], pieces: Sequence[tuple[str, TokenIds]]) -> SharedHashes:
        """Extend `path` by `pieces`. Returns the known block hashes, which all beginnings on the path now share."""
        known = path[-1].hashes[: path[-1].tokens // self._block_size]
        for i, (text, ids) in enumerate(pieces):
            last, sample = path[-1], self._sample(text, 0)
            place = 0 if i else self._place(last, sample)  # nothing else follows a new piece yet
            tokens = last.tokens + len(ids)
            key, number = (last.number, sample, place), next(self._numbers)
            path.append(_Beginning(key=key, number=number, text=text, ids=ids, tokens=tokens, before=last.key))
        hashes = SharedHashes(known, limit=path[-1].tokens // self._block_size)
        for each in reversed(path[1:]):  # the shortest are used last, so they stay longest
            each.hashes = hashes
            if self._beginnings.get(each.key) is not each:
                size = _bytes(each.text, each.ids) + len(each.ids) // self._block_size * _HASH_BYTES
                for evicted in self._beginnings.put(each.key, each, size):
                    self._shorten(evicted)
        return hashes

    def _shorten(self, evicted: _Beginning) -> None:
        """Trim the hashes of the beginnings that lead to an evicted one to their own length."""
        shared, before = evicted.hashes, self._beginnings.peek(evicted.before)
        kept = shared[: before.tokens // self._block_size] if before is not None else []
        while before is not None and before.hashes is shared:
            before.hashes = kept
            before = self._beginnings.peek(before.before)

    def _place(self, last: _Beginning, sample: str) -> int:
        """A free place for a beginning after `last`; any place if all are taken."""
        free = (place for place in range(_PLACES) if self._beginnings.get((last.number, sample, place)) is None)
        return next(free, next(self._numbers) % _PLACES)


@dataclass(slots=True, kw_only=True, eq=False)
class _Beginning:
    """The last piece of a path of pieces that starts at a prompt's beginning."""

    key: _Key
    number: int
    text: str
    ids: TokenIds
    tokens: int
    """Number of tokens in the whole path."""
    before: _Key
    """Key of the preceding path; a root has its own key here."""
    hashes: list[int] = field(default_factory=list)
    """Starts with the known hashes of the path's blocks; may go on with those of longer paths."""


def _bytes(text: str, ids: TokenIds) -> int:
    return sys.getsizeof(text) + ids.nbytes


class Lru(Generic[K, V]):
    """A dict of bounded size that evicts the least recently used entries."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.bytes = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self.bytes = 0

    def get(self, key: K) -> V | None:
        """The value, which then counts as used; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def peek(self, key: K) -> V | None:
        """As `get`, without marking the entry as used."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def pop(self, key: K) -> V | None:
        """Drop a value and return it; None if there is none."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self.bytes -= entry[1]
        return entry[0]

    def put(self, key: K, value: V, size: int) -> list[V]:
        """Store `value`, whose content takes `size` bytes, unless it is larger than the whole cache.

        Returns the values that were replaced or evicted.
        """
        cost = size + _ENTRY_BYTES
        if cost > self._max_bytes:
            return []
        old = self.pop(key)
        gone = [] if old is None else [old]
        self._entries[key] = value, cost
        self.bytes += cost
        while self.bytes > self._max_bytes:
            _, (value, freed) = self._entries.popitem(last=False)
            gone.append(value)
            self.bytes -= freed
            self.evicted += 1
        return gone
