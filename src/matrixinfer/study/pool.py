"""The blocks of one engine's cache, or of several engines that share one: a lean `sim.block_pool` for one full-attention group.

It evicts the same blocks in the same order; `tests/unit/study/test_engine.py` compares both. Blocks are named by the hashes
of their prefixes, and may be cached twice under the same hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice, takewhile


class Pool:
    """`capacity` blocks. `removed` collects the hashes of evicted blocks until someone takes them."""

    __slots__ = ("_copies", "_free", "_keys", "_users", "cached", "capacity", "removed")

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"expected at least 1 block, got {capacity}")
        self.capacity = capacity
        self.cached: dict[int, int] = {}
        """Hash to the block that is found by it."""
        self.removed: list[int] = []
        self._copies: dict[int, list[int]] = {}  # further blocks under the same hash, oldest first
        self._users = [0] * capacity
        self._keys: list[int | None] = [None] * capacity
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(capacity))

    @property
    def free(self) -> int:
        """Blocks that no running request uses, cached or not."""
        return len(self._free)

    def matched(self, hashes: Sequence[int], most: int) -> list[int]:
        """The cached blocks of the longest prefix, at most `most` of them."""
        find, blocks = self.cached.get, []
        for key in hashes[:most]:
            block = find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count(self, hashes: Sequence[int]) -> int:
        """How many blocks of a prompt are cached, consecutively from its start."""
        return len(list(takewhile(self.cached.__contains__, hashes)))

    def pushed_out(self, count: int) -> list[int]:
        """The hashes that would be evicted if `count` blocks were taken now."""
        return [key for block in islice(self._free, count) if (key := self._keys[block]) is not None]

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` no running request uses."""
        users = self._users
        return sum(not users[block] for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to each block."""
        users, free = self._users, self._free
        for block in blocks:
            if not users[block]:
                del free[block]
            users[block] += 1

    def take(self, count: int) -> list[int]:
        """Take the `count` least recently used free blocks; what they cached is evicted."""
        pop, users, keys = self._free.popitem, self._users, self._keys
        taken = []
        for _ in range(count):
            block = pop(last=False)[0]
            users[block] = 1
            key = keys[block]
            if key is not None:
                keys[block] = None
                self._uncache(key, block)
            taken.append(block)
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """Drop a user of each of a request's `blocks`: its tail is reused before its head, and blocks without content first."""
        users, free, keys = self._users, self._free, self._keys
        worthless = []
        for block in reversed(blocks):
            users[block] -= 1
            if not users[block]:
                free[block] = None
                if keys[block] is None:
                    worthless.append(block)
        for block in reversed(worthless):
            free.move_to_end(block, last=False)

    def store(self, key: int, block: int) -> None:
        """Make a full block findable."""
        self._keys[block] = key
        if self.cached.setdefault(key, block) != block:
            self._copies.setdefault(key, []).append(block)

    def clear(self) -> bool:
        """Forget all content. Returns False, and changes nothing, while any block is in use."""
        if len(self._free) < self.capacity:
            return False
        self.cached.clear()
        self._copies.clear()
        self._keys = [None] * self.capacity
        return True

    def _uncache(self, key: int, block: int) -> None:
        self.removed.append(key)
        copies = self._copies.get(key)
        if copies is None:
            del self.cached[key]
            return
        if self.cached[key] == block:
            self.cached[key] = copies.pop(0)
        else:
            copies.remove(block)
        if not copies:
            del self._copies[key]
