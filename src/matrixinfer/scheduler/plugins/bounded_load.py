"""`bounded-load`: keeps affinity from piling requests on one pod.

The bound is that of consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2016), with a floor for
idle fleets.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, ClassVar

from msgspec import Meta

from matrixinfer.config import Count, Section, described
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Services


class BoundedLoad(Plugin):
    """Removes pods whose requests in flight, with this one, would exceed the bound.

    The bound is `max(minInFlight, ceil(factor × (total in flight + 1) / pods))` over the remaining pods. The least
    loaded pod never exceeds it.
    """

    name: ClassVar[str] = "bounded-load"

    class Args(Section, frozen=True):
        """How far a pod may exceed its fair share."""

        factor: Annotated[
            float,
            Meta(ge=1, le=1000),
            described("The most requests in flight that a pod may have, in multiples of its fair share."),
        ] = 1.25
        min_in_flight: Annotated[
            Count,
            described(
                "Requests in flight that a pod may always have. Keeps a conversation on its pod in short bursts."
            ),
        ] = 4

    def __init__(self, args: Args, services: Services) -> None:
        # The factor as it is written: the float 1.1 is a little above 11/10, and `ceil` would make that one more request.
        self._factor = Fraction(str(args.factor))
        self._min_in_flight = args.min_in_flight

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[str | None]:
        counts = [pod.in_flight for pod in candidates]
        limit = bound(sum(counts), len(counts), factor=self._factor, min_in_flight=self._min_in_flight)
        return [f"{n + 1} in flight with this request, the bound is {limit}" if n >= limit else None for n in counts]


def bound(in_flight: int, pods: int, *, factor: Fraction, min_in_flight: int) -> int:
    """Most requests that one of `pods` pods may have, when one more joins the `in_flight` requests of all pods."""
    if pods == 0:
        return min_in_flight
    ceiling = -(-factor.numerator * (in_flight + 1) // (factor.denominator * pods))
    return max(min_in_flight, ceiling)
