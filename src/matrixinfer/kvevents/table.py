"""A dense map from engine blocks to small numbers.

A dict spends about 100 bytes on a 64-bit key and its value; here it is 14. Records of 12 bytes, a key and a number, lie in
a fixed number of buckets, each a byte string that is searched by its own `find`. Nothing ever moves all at once, as a
dict does when it grows: with a million blocks that would stop the event loop for tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

_KEY, _NUMBER, _RECORD = Struct("<Q"), Struct("<I"), Struct("<QI")
_SIZE = _RECORD.size
_BUCKETS = 2_048
_MASK = _BUCKETS - 1


class BlockTable:
    """Numbers below 2^32 by engine block, an integer of 64 bits without sign whose low bits are random."""

    __slots__ = ("_buckets", "_count")

    def __init__(self) -> None:
        self._buckets: list[bytearray | None] = [None] * _BUCKETS
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, block: int) -> int | None:
        """The block's number."""
        bucket = self._buckets[block & _MASK]
        if bucket is None:
            return None
        at = bucket.find(_KEY.pack(block))
        if at % _SIZE and (at := _aligned(bucket, block, at)) < 0:
            return None
        number: int = _NUMBER.unpack_from(bucket, at + 8)[0]
        return number

    def add(self, blocks: Iterable[int], number: int) -> None:
        """Give `number` to blocks that are not there yet."""
        buckets, pack, added = self._buckets, _RECORD.pack, 0
        for block in blocks:
            bucket = buckets[block & _MASK]
            if bucket is None:
                buckets[block & _MASK] = bytearray(pack(block, number))
            else:
                bucket += pack(block, number)
            added += 1
        self._count += added

    def pop(self, block: int) -> int | None:
        """Remove a block. Returns the number that it had."""
        bucket = self._buckets[block & _MASK]
        if bucket is None:
            return None
        at = bucket.find(_KEY.pack(block))
        if at % _SIZE and (at := _aligned(bucket, block, at)) < 0:
            return None
        number: int = _NUMBER.unpack_from(bucket, at + 8)[0]
        del bucket[at : at + _SIZE]
        self._count -= 1
        return number


def _aligned(bucket: bytearray, block: int, at: int) -> int:
    """Where the record of `block` begins, whose bytes first occur at `at`, but not at a record's beginning; or -1."""
    key = _KEY.pack(block)
    while at >= 0 and at % _SIZE:
        at = bucket.find(key, at + 1)
    return at
