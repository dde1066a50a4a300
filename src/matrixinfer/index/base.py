"""The contract of a block index. Every backend passes `matrixinfer.testing.BlockIndexConformance`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStats:
    """Counters of one index. `memory_bytes` is an estimate.

    Reusable ends are not counted in `blocks` and `pods`, but in `memory_bytes` and, once they are evicted, in `evicted`.
    """

    blocks: int
    pods: int
    evicted: int
    memory_bytes: int


class BlockIndex(Protocol):
    """Stores which pod holds which block, per model.

    Writes return immediately; a backend behind a network may buffer them until `flush`. A block is a hash from
    `matrixinfer.blocks`. Adding a block twice, or removing a block that is absent, has no effect: the caller counts the
    supports of a block. `match` and `last` are the only calls on the request path.

    A name that ends in `~ends` (`EndpointName.ends`) stands for an endpoint's reusable ends. They are added and removed
    like blocks, but need no parents, and `clear` and `forget` of the endpoint's own name leave them as they are. Only
    `last` finds them: `match` never lists such a name, so that no caller takes one for a pod.
    """

    @property
    def prefix_closed(self) -> bool:
        """True if a pod that holds block k of a chain always holds every block before it, so that lookups may gallop."""
        ...

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        """Record that `pod` holds `hashes`: consecutive blocks of one chain, the first of which follows `parent`."""
        ...

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        """Record that `pod` no longer holds `hashes`."""
        ...

    def clear(self, pod: str) -> None:
        """Remove all blocks of `pod`, for every model."""
        ...

    def forget(self, pod: str) -> None:
        """As `clear`, and also delete all bookkeeping of `pod`, which has gone."""
        ...

    async def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, int]:
        """How many blocks each pod holds, consecutively from the start. Pods without a match are absent.

        Reads `hashes` only as far as any pod matches, or a little further when galloping. Raises `IndexUnavailable` if
        the backend cannot answer in time.
        """
        ...

    async def last(self, model: str, pods: Collection[str], hashes: Sequence[int]) -> Mapping[str, int]:
        """The position in `hashes` of the last block that each of `pods` holds. Pods that hold none are absent.

        Unlike those of `match`, these blocks need no others before them. `pods` are names as they were added, also those
        of reusable ends. Raises `IndexUnavailable` if the backend cannot answer in time.
        """
        ...

    async def flush(self) -> None:
        """Wait until all writes so far are visible to `match`."""
        ...

    def stats(self) -> IndexStats:
        """The current counters."""
        ...
