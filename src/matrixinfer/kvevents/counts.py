"""What one engine's events add up to, and the error for events that say nothing."""

from __future__ import annotations

from dataclasses import dataclass

from matrixinfer.errors import MatrixInferError
from matrixinfer.kvevents.limits import ORPHANS, Limits

_FEW_ORPHANS = 16
_MOST_ORPHANS = 50
"""One orphan in so many blocks stored is taken for a late beginning, not for a loss."""


class UntrustedEvents(MatrixInferError):
    """The engine's events do not say what it holds. `reason` explains why, for operators."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, kw_only=True)
class LedgerStats:
    """Counts of what the events reported, in engine blocks unless stated otherwise."""

    stored: int = 0
    removed: int = 0
    clears: int = 0
    """AllBlocksCleared events."""
    copies: int = 0
    """Stored again while present."""
    reported_again: int = 0
    """Reported as stored because a request found them in the cache (vLLM's `kv_cache_report_mode`): not copies."""
    orphans: int = 0
    """Dropped because their parent was never seen."""
    unknown_removed: int = 0
    """Removed, but never seen."""
    ended: int = 0
    """Present but not indexed: their content depends on more than tokens, adapter and salt."""
    other_attention: int = 0
    """Events of attention groups that do not hold whole prefixes."""
    misfits: int = 0
    """Events whose tokens do not fit their blocks."""


class Orphans:
    """Counts blocks that were dropped because their parents are unknown, and notes when they are many."""

    def __init__(self, stats: LedgerStats, limits: Limits) -> None:
        self._stats = stats
        self._limits = limits
        self._stored_before = self._orphans_before = 0

    def drop(self, count: int) -> None:
        """So many blocks were dropped."""
        self._stats.orphans += count
        orphans = self._stats.orphans - self._orphans_before
        if orphans > _FEW_ORPHANS and orphans * _MOST_ORPHANS > self._stats.stored - self._stored_before:
            self._limits.note(ORPHANS)

    def clear(self) -> None:
        """Every block is gone, and what was dropped with them: begin to count again."""
        self._stored_before, self._orphans_before = self._stats.stored, self._stats.orphans
