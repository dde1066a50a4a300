"""The room that dicts keep for entries that are gone."""

from __future__ import annotations

from collections.abc import Sized

_ROOMY_BYTES = 75  # per entry, which takes 24, and 1.5 to 6 in the hash table: there is room for 2.5 times as many
_EMPTY_BYTES = 150  # a dict itself, and the eight places that it has at least


def is_roomy(entries: Sized) -> bool:
    """Whether a copy of this dict would be much smaller than it is.

    Each time that a dict fills up, removed entries included, Python gives it room for two to four times as many entries
    as it has, and never takes any back. A copy has room for one to two times as many. Where that would be tight, the
    dict would soon grow again, and is not roomy.
    """
    return entries.__sizeof__() > _ROOMY_BYTES * len(entries) + _EMPTY_BYTES
