"""How much of its predicted hits an endpoint really reuses, as its answers report it. Pure.

The share is a moving one: each answer that reports less than predicted lowers it, each that agrees raises it, and with
time it goes back to 1, so that an endpoint that is avoided is tried again. What was evicted while a request waited counts
as reused.
"""

from __future__ import annotations

LEAST = 0.1
"""The smallest share: a hit is never worth nothing."""
WEIGHT = 0.2
"""The weight of one answer; less if less was predicted for it than usual."""
GRACE_SECONDS = 60.0
HALF_LIFE_SECONDS = 300.0
"""Without answers a shortfall stays for the first time, and then halves in each of the second."""
SHORT_AFTER = 6
"""Answers with less than predicted after which the events are known to say too much. Two that agree offset one."""
_NEGLIGIBLE = 0.02


class Reuse:
    """The share of one endpoint. Every `now` is in seconds and must not decrease."""

    __slots__ = ("_at", "_shortfall", "_signs", "_usual", "is_short")

    def __init__(self) -> None:
        self.is_short = False
        """Whether answers have reported less than predicted again and again, until twice as many agree."""
        self._shortfall = 0.0
        self._at = 0.0
        self._signs = 0.0
        self._usual = 0.0  # tokens predicted

    def share(self, now: float) -> float:
        """Share of a predicted hit that is reused: `LEAST` to 1, and 1 as long as the events are not known to say too much."""
        if not self.is_short:
            return 1.0
        shortfall = self._faded(now)
        return 1.0 if shortfall < _NEGLIGIBLE else max(LEAST, 1.0 - shortfall)

    def observe(self, predicted: int, found: int, now: float) -> None:
        """An answer reports `found` tokens where at least `predicted` were expected; nothing follows from 0 expected."""
        if predicted <= 0:
            return
        missing = max(0, predicted - found) / predicted
        faded = self._faded(now)
        self._usual += (predicted - self._usual) * (WEIGHT if self._usual else 1.0)
        weight = WEIGHT * min(1.0, predicted / self._usual)
        self._shortfall, self._at = faded + weight * (missing - faded), now
        if self._shortfall < _NEGLIGIBLE and not missing:
            self._shortfall = 0.0
        self._signs = min(self._signs + 1.0, SHORT_AFTER) if missing else max(self._signs - 0.5, 0.0)
        if self._signs >= SHORT_AFTER:
            self.is_short = True
        elif not self._signs:
            self.is_short = False

    def start_over(self) -> None:
        """The endpoint is indexed again: how wrong the old index was says nothing about the new one."""
        self._shortfall = 0.0

    def _faded(self, now: float) -> float:
        idle = now - self._at - GRACE_SECONDS
        return self._shortfall if idle <= 0.0 else self._shortfall * 0.5 ** (idle / HALF_LIFE_SECONDS)
