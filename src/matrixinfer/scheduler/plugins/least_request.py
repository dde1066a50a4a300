"""`least-request`: prefers pods with few requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from matrixinfer.config import Count, Section, described
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services

_SMALL = 4.0
"""The smallest scale of `spread`: how many requests make a difference on an idle fleet."""


class LeastRequest(Plugin):
    """Removes pods whose engine has a long queue, and scores the others by their load: 100 for the least."""

    name: ClassVar[str] = "least-request"

    class Args(Section, frozen=True):
        """When an engine's queue is too long."""

        max_waiting_requests: Annotated[
            Count, described("A pod gets no request while this many requests, or more, wait in its engine.")
        ] = 10

    def __init__(self, args: Args, services: Services) -> None:
        self._max_waiting = args.max_waiting_requests

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[str | None]:
        """Keep pods without fresh metrics."""
        limit = self._max_waiting
        return [
            f"{waiting} requests waiting, the limit is {limit}"
            if pod.waiting is not None
            and pod.waiting >= limit
            and pod.metrics_age is not None
            and (waiting := pod.queue_length or 0) >= limit
            else None
            for pod in candidates
        ]

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        return Scores(values=spread([pod.load for pod in candidates]))


def spread(loads: Sequence[int]) -> list[float]:
    """Score 100 for the least loaded pod, and less for a higher load; 50 for a load that is one scale higher.

    `score = 100 × scale / (scale + load − least)`, with `scale = max(4, mean load)`. Equal loads score 100.

    kthena scores `(max − load) / max` instead. On an idle fleet, a single request then makes the difference between 0
    and 100 and outweighs a warm cache; under load, one overloaded pod makes all others look alike. With the mean as
    scale, a load counts by how much it exceeds the usual one, and one outlier changes the scale little.
    """
    if not loads:
        return []
    least = min(loads)
    scale = max(_SMALL, sum(loads) / len(loads))
    return [
        100.0 * (scale / (scale + (load - least))) for load in loads
    ]  # the least load is subtracted first, so that no score exceeds 100 by noise
