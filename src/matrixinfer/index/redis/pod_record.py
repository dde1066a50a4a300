"""The writer's record of one pod: the blocks it holds, whether Redis is up to date, and the lease."""

from __future__ import annotations

from collections.abc import Iterator

from matrixinfer.index.redis.commands import Lease
from matrixinfer.index.redis.outbox import Outbox


class PodRecord:
    """Changed only by its writer. At most `max_waiting` blocks wait to be written. Times are Unix seconds."""

    def __init__(self, max_waiting: int) -> None:
        self.outbox = Outbox(max_waiting)
        self.lease: Lease | None = None
        self.needs_resync = True
        """Whether Redis may hold anything for this pod, so that all its blocks must be written again."""
        self.min_stamp = 0
        """Smallest stamp for blocks that are written now."""
        self.renew_at = float("-inf")
        self.unconfirmed = False
        """Whether the server may still execute a write that failed here, so that the lease needs a new token."""
        self.published_state: str | None = None
        self.leaving = False
        self.unknown_since: float | None = None
        """Since when it is not known what the pod holds; None while it is known."""
        self.restamping: Iterator[tuple[str, int]] = iter(())
        self.restamp_at = float("inf")
        self.restamps_per_tick = 0

    @property
    def has_work(self) -> bool:
        """Whether its writer has something to do for the pod now."""
        return self.lease is not None and (
            self.outbox.waiting > 0
            or (self.needs_resync and self.unknown_since is None)
            or self.outbox.overflowed
            or self.leaving
        )

    def lose_lease(self) -> None:
        """Drop the lease: another writer has taken over, or may have."""
        self.lease, self.needs_resync, self.published_state, self.renew_at = None, True, None, float("-inf")
