"""How this gateway's requests come: the work that each brings, and how many come together. Pure."""

from __future__ import annotations

from collections import deque

TOGETHER_SECONDS = 0.05
"""What gateways that hear each other have sent within this time, they may not know of each other."""
LATELY_SECONDS = 1.0
"""The same for gateways that see each other's requests in the engines' gauges only, which are read so often."""
_SHARE = 0.05
"""What one request counts for in the averages."""
_TIMES_KEPT = 64


class Arrivals:
    """Averages over the last requests. Every `now` is in seconds and must not decrease.

    Gateways behind one balancer get the same kind of traffic, so these are also what is to be expected of the others.
    """

    __slots__ = ("_times", "lately", "together", "work")

    def __init__(self) -> None:
        self.work = 0.0
        """Prompt tokens that a request lets a pod compute, each counted by how long it takes."""
        self.together = 0.0
        """Requests within `TOGETHER_SECONDS` before one, at most 64."""
        self.lately = 0.0
        """Requests within `LATELY_SECONDS` before one, at most 64."""
        self._times: deque[float] = deque(maxlen=_TIMES_KEPT)

    def sent(self, work: float, now: float) -> None:
        """A request was sent to a pod, which has so much to compute."""
        times = self._times
        while times and times[0] < now - LATELY_SECONDS:
            times.popleft()
        together, since = 0, now - TOGETHER_SECONDS
        for at in reversed(times):
            if at < since:
                break
            together += 1
        self.work += (work - self.work) * _SHARE
        self.together += (together - self.together) * _SHARE
        self.lately += (len(times) - self.lately) * _SHARE
        times.append(now)
