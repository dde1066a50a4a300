"""An index that only says what it would write into Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from matrixinfer.index.base import IndexStats
from matrixinfer.index.redis import layout


class DryRunIndex:
    """A `BlockIndex` that hands the commands which would be sent, as text, to `say`. Nothing matches.

    Use as an async context manager: as with a connection, nothing is said before and after.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._to = say
        self._open = False

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False

    def _say(self, line: str) -> None:
        if self._open:
            self._to(line)

    @property
    def prefix_closed(self) -> bool:
        """As in Redis."""
        return False

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """One line a block."""
        for block in hashes:
            self._say(f"HSET {layout.prefix_of(model)}{block} {pod} <now>")

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """One line a block."""
        for block in hashes:
            self._say(f"HDEL {layout.prefix_of(model)}{block} {pod}")

    def clear(self, pod: str) -> None:
        """One line."""
        self._say(f"HSET {layout.EPOCHS} {pod} <above all that was stamped>")

    def forget(self, pod: str) -> None:
        """As `clear`."""
        self.clear(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        """Nothing."""
        return {}

    async def flush(self) -> None:
        """Nothing waits."""

    def stats(self) -> IndexStats:
        """Nothing is kept."""
        return IndexStats(blocks=0, pods=0, evicted=0, memory_bytes=0)
