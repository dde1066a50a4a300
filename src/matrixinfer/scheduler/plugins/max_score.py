"""`max-score`: ranks the highest total first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from matrixinfer.config import Section
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Services

_NOISE = 1e-9
"""Totals that differ by no more are equal: the order of additions alone can cause such a difference."""
_SETTLED = 3
"""Places where the order of equal totals matters: an endpoint after them gets the request only if all those fail."""


class MaxScore(Plugin):
    """Ranks by total. Equal totals are ranked by load, then by queued prompt tokens, then at random.

    Equal totals that all come after the third place keep their order.
    """

    name: ClassVar[str] = "max-score"

    class Args(Section, frozen=True):
        """No arguments."""

    def __init__(self, args: Args, services: Services) -> None:
        self._rng = services.rng

    def pick(
        self, request: SchedulingRequest, candidates: Sequence[Candidate], totals: Sequence[float]
    ) -> Sequence[int]:
        order = sorted(range(len(totals)), key=totals.__getitem__, reverse=True)
        start = 0
        while start < min(_SETTLED, len(order)):
            floor = totals[order[start]] - _NOISE
            end = start + 1
            while end < len(order) and totals[order[end]] >= floor:
                end += 1
            if end - start > 1:
                order[start:end] = self._settled(order[start:end], candidates)
            start = end
        return order

    def _settled(self, tied: Sequence[int], candidates: Sequence[Candidate]) -> list[int]:
        """The order of candidates whose totals are equal."""
        lots = {i: self._rng.random() for i in tied}
        by_lot = sorted(tied, key=lots.__getitem__)
        return sorted(by_lot, key=lambda i: (candidates[i].load, candidates[i].queued_tokens))
