"""What a source of pods is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from matrixinfer.config import PodConfig

Publish: TypeAlias = Callable[[Sequence[PodConfig]], None]
"""Takes the whole list whenever it was read without an error, also when it has not changed."""
Fail: TypeAlias = Callable[[str], None]
"""Takes the reason when the list could not be read. The last one still counts."""


class Source(Protocol):
    """Lists pods, for as long as it is watched."""

    async def watch(self, publish: Publish, fail: Fail) -> None:
        """Publish the list, at once and whenever it changes. Runs until it is cancelled."""
        ...
