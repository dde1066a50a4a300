"""One pod as its writer keeps it: what it holds, whether that is in Redis, and by which right it is written."""

from __future__ import annotations

from collections.abc import Iterator

from matrixinfer.index.redis.commands import Lease
from matrixinfer.index.redis.outbox import Outbox


class PodRecord:
    """Only its writer changes it. At most `waiting` blocks wait to be written."""

    def __init__(self, waiting: int) -> None:
        self.outbox = Outbox(waiting)
        self.hold: Lease | None = None
        self.doubtful = True
        """What is in Redis may be anything."""
        self.least = 0
        """Stamp of what is written now."""
        self.renew_at = float("-inf")
        self.unanswered = False
        """What was sent last may be done yet, whenever it reaches the server."""
        self.state: str | None = None
        """As last told."""
        self.leaving = False
        self.unknown_since: float | None = None
        """From when on it has not been known what the pod holds."""
        self.restamping: Iterator[tuple[str, int]] = iter(())
        self.restamp_at = float("inf")
        self.pace = 0
        """Blocks stamped anew per tick."""

    @property
    def pending(self) -> bool:
        """Whether its writer has something to do for the pod now."""
        return self.hold is not None and (
            self.outbox.waiting > 0
            or (self.doubtful and self.unknown_since is None)
            or self.outbox.overflowed
            or self.leaving
        )

    def lose(self) -> None:
        """Another writer has come, or may have."""
        self.hold, self.doubtful, self.state, self.renew_at = None, True, None, float("-inf")
