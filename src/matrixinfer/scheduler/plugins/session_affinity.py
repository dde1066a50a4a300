"""`session-affinity`: prefers the pod that a session's last request went to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from matrixinfer.config import Count, Seconds, Section, described
from matrixinfer.scheduler.framework import Candidate, Decision, Plugin, SchedulingRequest, Scores, Services

_SMALL_LOAD = 4.0
"""The mean load below which the limit is that of this mean: a few requests on an idle fleet are no overload."""


class SessionAffinity(Plugin):
    """Scores 100 for the pod that the session's last request went to, 0 for all others.

    It is soft: other scorers may outweigh it. It ends `ttlSeconds` after the session's last request, and does not count
    while that pod has more than `maxLoad` times the mean load. A session is what the client names one by a header (see
    the guide); it takes no part in the decision about a request without one. The `maxSessions` sessions used last are kept.
    """

    name: ClassVar[str] = "session-affinity"
    needs_session: ClassVar[bool] = True

    class Args(Section, frozen=True):
        """How long a session is remembered, and when its pod is too busy."""

        ttl_seconds: Annotated[Seconds, described("How long after its last request a session is remembered.")] = 600.0
        max_load: Annotated[
            float,
            Meta(ge=1, le=1000),
            described("The affinity does not count at a pod with more requests than this many times the mean."),
        ] = 2.0
        max_sessions: Annotated[Count, described("How many sessions are remembered at most.")] = 100_000

    def __init__(self, args: Args, services: Services) -> None:
        self._ttl = args.ttl_seconds
        self._max_load = args.max_load
        self._most = args.max_sessions
        self._last: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()  # (model, session) -> pod, until

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        values = [0.0] * len(candidates)
        known = None if request.session is None else self._last.get((request.model, request.session))
        if known is None or known[1] <= request.now:
            return Scores(values=values)
        name = known[0]
        at = next((i for i, pod in enumerate(candidates) if pod.name == name), None)
        if at is None:
            return Scores(values=values)
        load, mean = candidates[at].load, sum(pod.load for pod in candidates) / len(candidates)
        limit = self._max_load * max(mean, _SMALL_LOAD)
        if load > limit:
            note = f"the session's pod {name} has {load} requests, the limit is {limit:.1f}"
            return Scores(values=values, note=note)
        values[at] = 100.0
        return Scores(values=values)

    def post_schedule(self, request: SchedulingRequest, decision: Decision) -> None:
        """Remember where the session is now, whatever chose that pod."""
        if request.session is None:
            return
        key = request.model, request.session
        self._last[key] = decision.chosen.name, request.now + self._ttl
        self._last.move_to_end(key)
        while self._last and (len(self._last) > self._most or next(iter(self._last.values()))[1] <= request.now):
            self._last.popitem(last=False)
