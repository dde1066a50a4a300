"""The room that dicts keep when entries come and go."""

from __future__ import annotations

from collections.abc import Sized

_ROOMY_BYTES = 75  # per entry: 24 for an entry, 1.5 to 6 for its place in the hash table, times 2.5 or more
_EMPTY_BYTES = 150  # of a dict, and of the eight places that it has at least


def is_roomy(entries: Sized) -> bool:
    """Whether a copy of this dict would be much smaller than it is.

    Each time that a dict fills up, removed entries included, Python gives it room for two to four times as many entries
    as it has, and never takes any back. A copy has room for one to two times as many. Where that would be tight, the
    dict would soon grow again, and is not roomy.
    """
    return entries.__sizeof__() > _ROOMY_BYTES * len(entries) + _EMPTY_BYTES
