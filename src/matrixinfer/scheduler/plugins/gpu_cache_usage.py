"""`gpu-cache-usage`: prefers pods with free KV blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from matrixinfer.config import Section
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services


class GpuCacheUsage(Plugin):
    """Scores the free share of a pod's KV blocks. A pod whose use is unknown gets the mean of the others, or 50."""

    name: ClassVar[str] = "gpu-cache-usage"

    class Args(Section, frozen=True):
        """No arguments."""

    def __init__(self, args: Args, services: Services) -> None: ...

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        known = _free([pod.cache_usage for pod in candidates if pod.cache_usage is not None])
        unknown = len(candidates) - len(known)
        if unknown == 0:
            return Scores(values=known)
        neutral = sum(known) / len(known) if known else 50.0
        rest = iter(known)
        return Scores(
            values=[neutral if pod.cache_usage is None else next(rest) for pod in candidates],
            note=f"cache use is unknown for {unknown} of {len(candidates)} pods",
        )


def _free(usages: Sequence[float]) -> list[float]:
    free = [100.0 * (1.0 - usage) for usage in usages]
    if free and (min(free) < 0.0 or max(free) > 100.0):  # engines may report values a little outside 0 to 1
        return [min(100.0, max(0.0, share)) for share in free]
    return free
