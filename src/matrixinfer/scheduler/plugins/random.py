"""`random`: random scores, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from matrixinfer.config import Section
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services


class Random(Plugin):
    """Scores each pod at random."""

    name: ClassVar[str] = "random"

    class Args(Section, frozen=True):
        """No arguments."""

    def __init__(self, args: Args, services: Services) -> None:
        self._rng = services.rng

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        return Scores(values=[self._rng.random() * 100.0 for _ in candidates])
