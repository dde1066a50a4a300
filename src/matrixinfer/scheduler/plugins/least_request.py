"""`least-request`: prefers the pod with the least to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from matrixinfer.config import Count, Section, described
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services

_SMALL = 4.0
"""Requests that make a difference on an idle fleet: see `spread`."""


class LeastRequest(Plugin):
    """Removes pods whose engine has a long queue; scores the rest by `spread` of their load."""

    name: ClassVar[str] = "least-request"

    class Args(Section, frozen=True):
        """When a queue is too long."""

        max_waiting_requests: Annotated[
            Count, described("Pods whose engine has this many requests waiting, or more, take no further one.")
        ] = 10

    def __init__(self, args: Args, services: Services) -> None:
        self._max_waiting = args.max_waiting_requests

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[str | None]:
        """Pods without fresh metrics stay."""
        limit = self._max_waiting
        return [
            f"{pod.waiting} requests waiting, the limit is {limit}"
            if pod.waiting is not None and pod.waiting >= limit and pod.metrics_age is not None
            else None
            for pod in candidates
        ]

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        """See `spread`."""
        return Scores(values=spread([pod.load for pod in candidates]))


def spread(loads: Sequence[int]) -> list[float]:
    """100 for the least loaded pod, falling with the excess over it; 50 at an excess of one scale.

    `score = 100 × scale / (scale + load − least)`, with `scale = max(4, mean load)`. Equal loads score 100.

    kthena rates `(max − load) / max` instead. There one request more or less decides between 0 and 100 on an idle
    fleet, so that it outweighs a warm cache; and under load one overloaded pod makes all others look alike. Against
    the mean, an excess counts by what it adds to the usual queue, and one outlier moves the scale little.
    """
    if not loads:
        return []
    least = min(loads)
    scale = max(_SMALL, sum(loads) / len(loads))
    return [100.0 * (scale / (scale + (load - least))) for load in loads]  # least first: no noise above 100
