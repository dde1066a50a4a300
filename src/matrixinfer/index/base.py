"""The contract of a block index. Every backend passes `matrixinfer.testing.BlockIndexConformance`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStats:
    """Counts of one index. Memory is an estimate in bytes."""

    blocks: int
    pods: int
    evicted: int
    memory_bytes: int


class BlockIndex(Protocol):
    """Which pod holds which block, per model.

    Writes return at once; a backend behind a network may buffer them until `flush`. A block is a hash from
    `matrixinfer.blocks`. Adding what is there and removing what is not changes nothing: whoever feeds the index counts
    supports. `match` is the only call on the request path.
    """

    @property
    def prefix_closed(self) -> bool:
        """True when a pod that holds block k of a chain holds every block before it, so that look-ups may gallop."""
        ...

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """`pod` now holds `hashes`, consecutive blocks of one chain that follows the block `parent`."""
        ...

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """`pod` no longer holds `hashes`."""
        ...

    def clear(self, pod: str) -> None:
        """`pod` holds nothing any more, of any model."""
        ...

    def forget(self, pod: str) -> None:
        """`pod` is gone: as `clear`, and nothing is kept for its return."""
        ...

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        """How many blocks each pod holds consecutively from the start. Pods that hold none are absent.

        Reads `hashes` only as far as some pod matches (a little further when galloping). Raises `IndexUnavailable`
        when the backend cannot answer in time.
        """
        ...

    async def flush(self) -> None:
        """Wait until every write so far is visible to `match`."""
        ...

    def stats(self) -> IndexStats:
        """Current counts."""
        ...
