"""A dense map from engine blocks to small numbers.

A dict spends about 100 bytes on a 64-bit key and its value, this table 14. Records of 12 bytes, a key and a number, lie
in a fixed number of buckets, each a byte string that its own `find` searches. A dict moves all its entries at once when
it grows, which would block the event loop for tens of milliseconds at a million blocks; here nothing ever moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

_KEY, _NUMBER, _RECORD = Struct("<Q"), Struct("<I"), Struct("<QI")
_SIZE = _RECORD.size
_BUCKETS = 2_048
_MASK = _BUCKETS - 1


class BlockTable:
    """Maps engine blocks, unsigned 64-bit integers with random low bits, to numbers below 2^32."""

    __slots__ = ("_buckets", "_count")

    def __init__(self) -> None:
        self._buckets: list[bytearray | None] = [None] * _BUCKETS
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, block: int) -> int | None:
        """The block's number; None if it is not in the table."""
        bucket = self._buckets[block & _MASK]
        if bucket is None:
            return None
        at = bucket.find(_KEY.pack(block))
        if at % _SIZE and (at := _aligned(bucket, block, at)) < 0:
            return None
        number: int = _NUMBER.unpack_from(bucket, at + 8)[0]
        return number

    def add(self, blocks: Iterable[int], number: int) -> None:
        """Give `number` to blocks that are not in the table yet."""
        buckets, pack, added = self._buckets, _RECORD.pack, 0
        for block in blocks:
            bucket = buckets[block & _MASK]
            if bucket is None:
                buckets[block & _MASK] = bytearray(pack(block, number))
            else:
                bucket += pack(block, number)
            added += 1
        self._count += added

    def discard(self, blocks: Iterable[int]) -> None:
        """Remove those of `blocks` that are in the table."""
        buckets, pack, removed = self._buckets, _KEY.pack, 0
        for block in blocks:
            bucket = buckets[block & _MASK]
            if bucket is None:
                continue
            at = bucket.find(pack(block))
            if at % _SIZE and (at := _aligned(bucket, block, at)) < 0:
                continue
            del bucket[at : at + _SIZE]
            removed += 1
        self._count -= removed


def _aligned(bucket: bytearray, block: int, at: int) -> int:
    """The start of the record of `block`, whose bytes first occur at `at`, in the middle of a record; -1 if there is none."""
    key = _KEY.pack(block)
    while at >= 0 and at % _SIZE:
        at = bucket.find(key, at + 1)
    return at
