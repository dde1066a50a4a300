"""How an endpoint's last requests ended, and whether that is reason enough to eject it. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from matrixinfer.config import OutliersConfig

_Outcome: TypeAlias = Literal["answered", "failed", "doubted"]

_MAX_OUTCOMES = 256
"""The failure share is taken over at most this many of an endpoint's last requests."""


@dataclass(slots=True)
class Outcomes:
    """Failures count whether or not they are in doubt; `void` takes back those that are."""

    streak: int = 0
    """Failures in a row."""
    doubts: int = 0
    """How many of them may be the fault of the requests."""
    failures: int = 0
    """Failures since the last success, also those that are void."""
    recent: deque[tuple[float, _Outcome]] = field(default_factory=lambda: deque(maxlen=_MAX_OUTCOMES))
    """When each of the last requests ended, and how."""

    def answered(self, now: float) -> None:
        """A request was answered."""
        self.streak = self.doubts = self.failures = 0
        self.recent.append((now, "answered"))

    def failed(self, now: float, *, in_doubt: bool) -> None:
        """A request failed. `in_doubt`: perhaps by its own fault."""
        self.streak += 1
        self.failures += 1
        self.doubts += in_doubt
        self.recent.append((now, "doubted" if in_doubt else "failed"))

    def void(self) -> None:
        """Nothing that is in doubt counts any longer."""
        self.streak -= self.doubts
        self.doubts = 0
        certain = [outcome for outcome in self.recent if outcome[1] != "doubted"]
        self.recent.clear()
        self.recent.extend(certain)

    def forgive(self) -> None:
        """The endpoint has been ejected for all that."""
        self.streak = self.doubts = 0
        self.recent.clear()

    def due(self, config: OutliersConfig, now: float) -> str | None:
        """In words, why the endpoint is to be ejected; None if it is not."""
        if self.streak >= config.consecutive_failures:
            return f"{self.streak} failures in a row"
        recent = [outcome for at, outcome in self.recent if now - at <= config.window_seconds]
        failed = sum(outcome != "answered" for outcome in recent)
        if len(recent) >= config.min_requests and failed >= config.failure_share * len(recent):
            return f"{failed} of its last {len(recent)} requests failed"
        return None

    def has_failed_since(self, time: float) -> bool:
        """Whether one of the requests that ended since then failed."""
        return any(outcome != "answered" and at >= time for at, outcome in self.recent)
