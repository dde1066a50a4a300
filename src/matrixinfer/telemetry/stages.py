"""Who wants to know when the stages of a request began and ended."""

from __future__ import annotations

from typing import Protocol


class Stages(Protocol):
    """Takes the stages of one request."""

    def add(self, name: str, began: float, ended: float) -> None:
        """A stage is over. Times are seconds on the monotonic clock."""
