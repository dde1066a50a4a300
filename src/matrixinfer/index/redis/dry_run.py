"""An index that prints the commands that it would send to Redis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from matrixinfer.index.base import IndexStats
from matrixinfer.index.redis import layout


class DryRunIndex:
    """A `BlockIndex` that passes the commands it would send, as text, to `say`. Nothing ever matches.

    Use as an async context manager: outside of it no commands are printed. `redis_name` returns a model's name in Redis.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._write = say
        self._open = False
        self.redis_name: Callable[[str], str] = str

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False

    def _say(self, line: str) -> None:
        if self._open:
            self._write(line)

    @property
    def prefix_closed(self) -> bool:
        return False

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """Print one line per block."""
        for block in hashes:
            self._say(f"HSET {layout.prefix_of(self.redis_name(model))}{block} {pod} <now>")

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """Print one line per block."""
        for block in hashes:
            self._say(f"HDEL {layout.prefix_of(self.redis_name(model))}{block} {pod}")

    def clear(self, pod: str) -> None:
        """Print one line."""
        self._say(f"HSET {layout.EPOCHS} {pod} <above all stamps>")

    def forget(self, pod: str) -> None:
        """As `clear`."""
        self.clear(pod)

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        return {}

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> Mapping[str, int]:
        return {}

    async def flush(self) -> None:
        """Return at once: nothing is buffered."""

    def stats(self) -> IndexStats:
        return IndexStats(blocks=0, pods=0, evicted=0, memory_bytes=0)
