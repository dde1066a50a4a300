"""`round-robin`: takes pods in turn, for comparison."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from matrixinfer.config import Section
from matrixinfer.scheduler.framework import Candidate, Decision, Plugin, SchedulingRequest, Scores, Services

_MAX_MODELS = 1024


class RoundRobin(Plugin):
    """Scores 100 for the pod that follows the last chosen one in the order of names, and less for each later turn.

    Turns are kept per model, for the 1,024 models used last. The turn is kept by name, not by position, so pods may come
    and go.
    """

    name: ClassVar[str] = "round-robin"

    class Args(Section, frozen=True):
        """No arguments."""

    def __init__(self, args: Args, services: Services) -> None:
        self._last: OrderedDict[str, str] = OrderedDict()

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        names = sorted(pod.name for pod in candidates)
        first = bisect_right(names, self._last.get(request.model, ""))
        turns = names[first:] + names[:first]
        value = {name: 100.0 * (len(turns) - turn) / len(turns) for turn, name in enumerate(turns)}
        return Scores(values=[value[pod.name] for pod in candidates])

    def post_schedule(self, request: SchedulingRequest, decision: Decision) -> None:
        """Pass the turn to the pod after the chosen one, whatever chose it."""
        self._last[request.model] = decision.chosen.name
        self._last.move_to_end(request.model)
        if len(self._last) > _MAX_MODELS:
            self._last.popitem(last=False)
