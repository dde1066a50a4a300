"""What gateways report to each other in a replay, as often as they do over a shared Redis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from matrixinfer.study.jobs import Router
from matrixinfer.traffic.peers.announcements import MOST_PAUSE_SECONDS, pause_after


class Gossip:
    """Lets each of `routers` speak when it has sent a request, and at least every `MOST_PAUSE_SECONDS`.

    The others hear a message after `delay` seconds. `at` calls a function at a time of the replay.
    """

    def __init__(
        self, routers: Sequence[Router], delay: float, at: Callable[[float, Callable[[float], None]], None]
    ) -> None:
        self._routers = routers
        self._delay = delay
        self._at = at
        self._free_at = [0.0] * len(routers)
        """When each may speak again."""
        self._due = [math.inf] * len(routers)
        """When each will speak."""

    def start(self) -> None:
        """All of them speak."""
        for number in range(len(self._routers)):
            self.speak_at(number, 0.0)

    def speak_at(self, number: int, when: float) -> None:
        """Let a gateway speak at a time, or as soon after it as it may; not later than it would have."""
        due = max(when, self._free_at[number])
        if due < self._due[number]:
            self._due[number] = due
            self._at(due, partial(self._speak, number))

    def _speak(self, number: int, now: float) -> None:
        if self._due[number] != now:
            return  # it has spoken already
        speaker, self._due[number] = self._routers[number], math.inf
        message = speaker.say(now)
        if message is None:
            self.speak_at(number, now + MOST_PAUSE_SECONDS)
            return
        others = [router for router in self._routers if router is not speaker]
        self._free_at[number] = now + pause_after(message, len(others))
        self._at(now + self._delay, partial(_hear, others, message))
        self.speak_at(number, self._free_at[number])


def _hear(routers: Sequence[Router], message: bytes, _: float) -> None:
    for router in routers:
        router.hear(message)
