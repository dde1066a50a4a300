"""The blocks of all attention groups: who uses them, which are cached under which hash, and the order of evictions.

It behaves like vLLM's block pool: unused blocks wait in a queue and are reused from its head, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from matrixinfer.sim.cpu_tier import CpuTier
from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, Event

NO_BLOCK = 0


class Key(NamedTuple):
    """What a cached block is found by."""

    group: int
    block_hash: int


class BlockPool:
    """`num_blocks` blocks; block 0 is never used. Blocks that leave the GPU may stay in a CPU tier."""

    def __init__(self, num_blocks: int, cpu: CpuTier | None = None) -> None:
        self.num_blocks = num_blocks
        self.events: list[Event] = []
        self._cpu = cpu
        self._users = [0] * num_blocks
        self._keys: list[list[Key]] = [[] for _ in range(num_blocks)]
        self._copies: dict[Key, list[int]] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    def __len__(self) -> int:
        """Blocks that nobody uses, cached or not."""
        return len(self._free)

    def __iter__(self) -> Iterator[Key]:
        """The keys of the cached blocks."""
        return iter(self._copies)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return 1 - len(self._free) / (self.num_blocks - 1)

    def find(self, groups: Iterable[int], block_hash: int) -> list[int] | None:
        """The first of the blocks that are cached under a hash, in each of these groups; None where there is none."""
        found = []
        for group in groups:
            copies = self._copies.get(Key(group, block_hash))
            if copies is None:
                return None
            found.append(copies[0])
        return found

    def keys_of(self, block: int) -> list[Key]:
        """What a block is cached under."""
        return self._keys[block]

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody uses."""
        return sum(block != NO_BLOCK and not self._users[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more user of each block."""
        for block in blocks:
            if block != NO_BLOCK:
                if not self._users[block]:
                    del self._free[block]
                self._users[block] += 1

    def take(self) -> int:
        """A block for one user, from the head of the queue. It is not cached any more."""
        block, _ = self._free.popitem(last=False)
        self._users[block] = 1
        self.uncache(block)
        return block

    def give_back(self, blocks: Iterable[int]) -> None:
        """One user less of each block. The first is reused first; blocks that are not cached before any that is."""
        worthless = []
        for block in blocks:
            if block == NO_BLOCK:
                continue
            self._users[block] -= 1
            if self._users[block]:
                continue
            self._free[block] = None
            if not self._keys[block]:
                worthless.append(block)
        for block in reversed(worthless):
            self._free.move_to_end(block, last=False)

    def cache(self, block: int, key: Key) -> None:
        """Make a block findable."""
        self._keys[block].append(key)
        self._copies.setdefault(key, []).append(block)

    def uncache(self, block: int) -> None:
        """Make a block unfindable, and say so."""
        for key in self._keys[block]:
            copies = self._copies[key]
            copies.remove(block)
            if not copies:
                del self._copies[key]
                if self._cpu is not None:
                    self.events += self._cpu.evicted(key.block_hash)
            self.events.append(BlockRemoved(block_hashes=[key.block_hash], group_idx=key.group))
        self._keys[block] = []

    def reset(self) -> bool:
        """Uncache everything. Returns False, and changes nothing, while any block is in use."""
        if len(self._free) < self.num_blocks - 1:
            return False
        self._copies.clear()
        if self._cpu is not None:
            self._cpu.clear()
        self._keys = [[] for _ in range(self.num_blocks)]
        self.events.append(AllBlocksCleared())
        return True
