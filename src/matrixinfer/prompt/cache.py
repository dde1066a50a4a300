"""Tokenizing only what is new: pieces of text and beginnings of prompts that were seen before.

A text is cut where that changes no ids (`segments`), and the ids of every piece are remembered by its content. So a
conversation that has grown by a turn costs the new turn, and a system prompt is tokenized once.

What a prompt begins with is remembered too, as a path of pieces, and with it the block hashes that were computed for it.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from matrixinfer.blocks import TokenIds
from matrixinfer.prompt.segments import Cutter

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

NO_TOKENS: TokenIds = np.empty(0, dtype=np.uint32)

_ENTRY_BYTES = 400
"""What an entry takes beside its text, ids and hashes: objects, a place in a dict."""
_HASH_BYTES = 44
"""A block hash in a list: a Python integer and its pointer."""
_SHARE_OF_BEGINNINGS = 0.2


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
    """Remembers up to `max_bytes` of pieces, least recently used first out. Safe to use from several threads.

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
        beginnings = int(max_bytes * _SHARE_OF_BEGINNINGS)
        self._pieces: _Lru[str, _Piece] = _Lru(max_bytes - beginnings)
        self._beginnings: _Lru[tuple[int, int], _Beginning] = _Lru(beginnings)
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
    ) -> tuple[TokenIds, list[int]]:
        """The ids of `text` between `before` and `after`, shape (n,), and the block hashes known of their beginning.

        The list is meant to be extended as further blocks are hashed; prompts to come profit from it. `before` must be
        the same whenever it is not empty. Raises what `encode_each` raises.
        """
        texts = self.cutter.cut(text)
        with self._lock:
            found = [self._pieces.get(each) for each in texts]
        missing = list(dict.fromkeys(each for each, piece in zip(texts, found, strict=True) if piece is None))
        new = dict(zip(missing, self._encode_each(missing), strict=True))
        with self._lock:
            for each, ids in new.items():
                if self._pieces.get(each) is None:  # else another thread was faster
                    self._pieces.put(each, _Piece(next(self._numbers), ids), sys.getsizeof(each) + ids.nbytes)
            missed = sum(map(len, new))
            self._misses += missed
            self._hits += len(text) - missed
            pieces = [piece or self._made(each, new) for each, piece in zip(texts, found, strict=True)]
            hashes = self._known(pieces, len(before))
        return np.concatenate([before, *(piece.ids for piece in pieces), after]), hashes

    def _made(self, text: str, new: dict[str, TokenIds]) -> _Piece:
        """A piece just tokenized. One too large to be remembered gets a number that is never met again."""
        return self._pieces.get(text) or _Piece(next(self._numbers), new[text])

    def _known(self, pieces: Sequence[_Piece], tokens: int) -> list[int]:
        """Hashes of the longest remembered beginning of `pieces`, in a list that becomes that of every beginning."""
        path: list[_Beginning] = []
        known: _Beginning | None = None
        number = -1 if tokens else 0
        for piece in pieces:
            key = (number, piece.number)
            tokens += len(piece.ids)
            beginning = self._beginnings.get(key)
            if beginning is None:
                beginning = _Beginning(next(self._numbers), tokens, [])
                self._beginnings.put(key, beginning, len(piece.ids) // self._block_size * _HASH_BYTES)
            else:
                known = beginning
            path.append(beginning)
            number = beginning.number
        hashes = [] if known is None else known.hashes[: known.tokens // self._block_size]
        for beginning in path:
            beginning.hashes = hashes
        return hashes


@dataclass(slots=True)
class _Piece:
    number: int
    ids: TokenIds


@dataclass(slots=True)
class _Beginning:
    """A path of pieces from a prompt's start, and a list of block hashes that begins with its own."""

    number: int
    tokens: int
    hashes: list[int]


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

    def put(self, key: K, value: V, size: int) -> None:
        """Keep `value`, which takes `size` bytes and the entry itself; one that is too large is not kept."""
        cost = size + _ENTRY_BYTES
        if cost > self._max_bytes:
            return
        old = self._entries.pop(key, None)
        if old is not None:
            self.bytes -= old[1]
        self._entries[key] = value, cost
        self.bytes += cost
        while self.bytes > self._max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
            self.evicted += 1
