"""`bounded-load`: no affinity may pile requests on one pod.

The bound of consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2016), with a floor for idle
fleets.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, ClassVar

from msgspec import Meta

from matrixinfer.config import Count, Section, described
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Services


class BoundedLoad(Plugin):
    """Removes pods whose requests in flight, this one included, would exceed the bound.

    The bound is `max(minInFlight, ceil(factor × (total in flight + 1) / pods))` over the pods that are left. The least
    loaded pod never exceeds it.
    """

    name: ClassVar[str] = "bounded-load"

    class Args(Section, frozen=True):
        """How far a pod may stand above its fair share."""

        factor: Annotated[
            float, Meta(ge=1, le=1000), described("A pod's share of the requests in flight at most, in fair shares.")
        ] = 1.25
        min_in_flight: Annotated[
            Count, described("Requests that a pod may always have; keeps a conversation together on an idle fleet.")
        ] = 4

    def __init__(self, args: Args, services: Services) -> None:
        # The factor as it is written: 1.1 as a float lies above 11/10, which `ceil` would turn into one request more.
        self._factor = Fraction(str(args.factor))
        self._min_in_flight = args.min_in_flight

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[str | None]:
        """See the class."""
        counts = [pod.in_flight for pod in candidates]
        limit = bound(sum(counts), len(counts), factor=self._factor, min_in_flight=self._min_in_flight)
        return [f"{n + 1} in flight with this request, the bound is {limit}" if n >= limit else None for n in counts]


def bound(in_flight: int, pods: int, *, factor: Fraction, min_in_flight: int) -> int:
    """Most requests that one of `pods` pods may have when one more joins the `in_flight` requests of all."""
    if pods == 0:
        return min_in_flight
    ceiling = -(-factor.numerator * (in_flight + 1) // (factor.denominator * pods))
    return max(min_in_flight, ceiling)
