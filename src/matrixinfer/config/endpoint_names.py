"""How endpoints are named in the index, in feeds, metrics, headers and logs. Pure.

pod            a pod that is one cache
pod@dp1        data-parallel rank 1 of a pod, which is a cache of its own
pod~device     the blocks of such a cache that are in the device's memory, where it has slower tiers, too
pod@dp1~host   … in the device's or in the host's memory
pod~ends       the ends of the prefixes that such a cache can reuse, where not every prefix that it holds can be
"""

from __future__ import annotations

from typing import NamedTuple, Self

TIERS = ("device", "host")
"""Tiers with names of their own in the index, the fastest first."""
ENDS = "ends"
"""Stands in a tier's place in the index's name of an endpoint's reusable ends."""
_RANK, _TIER = "@dp", "~"
ENDS_SUFFIX = _TIER + ENDS
"""With it ends every such name, and no other."""


class EndpointName(NamedTuple):
    """A name in its parts: `str` puts them together, and `parse` takes them apart."""

    pod: str
    rank: int | None = None
    """Data-parallel rank; None for a pod that is one cache."""
    tier: str | None = None
    """One of `TIERS`, where the name stands for the blocks up to that tier only; or `ENDS`."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """The parts of a name. A name without any is a pod's."""
        rest, tier = name, None
        for each in (*TIERS, ENDS):
            if name.endswith(_TIER + each):
                rest, tier = name.removesuffix(_TIER + each), each
        pod, mark, number = rest.rpartition(_RANK)
        if mark and number.isascii() and number.isdecimal() and str(int(number)) == number:
            return cls(pod, int(number), tier)
        return cls(rest, None, tier)

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"{_RANK}{self.rank}"
        return self.pod + rank + ("" if self.tier is None else _TIER + self.tier)

    @property
    def endpoint(self) -> str:
        """The name of the endpoint, without the tier."""
        return str(self._replace(tier=None))

    @property
    def rank_label(self) -> str:
        """`dp1`; empty for a pod that is one cache."""
        return "" if self.rank is None else f"{_RANK[1:]}{self.rank}"

    def up_to(self, tier: str) -> str:
        """The index's name for the endpoint's blocks up to a tier."""
        return str(self._replace(tier=tier))

    @property
    def ends(self) -> str:
        """The index's name for the endpoint's reusable ends."""
        return str(self._replace(tier=ENDS))
