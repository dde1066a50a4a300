"""A paged prefix cache that behaves like vLLM's (block pool and KV cache manager of 0.32, one full-attention group).

It copies the behaviour, including the order of evictions:
- A block is named by a hash of all tokens up to its end.
- A request uses the cached blocks of its prefix, and free ones for the rest.
- A full block, of prompt or reply, becomes reusable when it is scheduled.
- A block that two requests compute at the same time is stored twice under one hash.
- Unused blocks wait in a queue and are reused from its head: least recently used first, a request's tail before its head.

Blocks that leave the GPU may stay in a CPU tier, and are loaded back when a prompt needs them.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items
from hashlib import sha256
from itertools import takewhile
from typing import NamedTuple

from matrixinfer.blocks import TokenIds
from matrixinfer.sim.cpu_tier import CpuTier
from matrixinfer.sim.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from matrixinfer.sim.prefix_cache import Adapter


class Sequence:
    """One request's tokens, the hashes of its full blocks, and the cache blocks that it uses."""

    __slots__ = ("adapter", "block_size", "blocks", "hashes", "salt", "stored", "tokens")

    def __init__(
        self, tokens: TokenIds, block_size: int, salt: str | None = None, adapter: Adapter | None = None
    ) -> None:
        self.tokens = array("I", tokens.astype("u4", copy=False).tobytes())
        self.block_size = block_size
        self.salt = salt
        self.adapter = adapter
        self.hashes: list[int] = []
        self.blocks: list[int] = []
        """Ids of its cache blocks, in the order of the tokens."""
        self.stored = 0
        """How many of these blocks, from the start, other requests can reuse."""
        self._hash_full_blocks()

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        if len(self.tokens) % self.block_size == 0:
            self._hash_full_blocks()

    def stored_event(self, first: int, last: int) -> BlockStored:
        """The event that the blocks [first, last) were stored."""
        name = () if self.adapter is None else (self.adapter.name,)
        salt = () if self.salt is None else (self.salt,)
        return BlockStored(
            block_hashes=self.hashes[first:last],
            parent_block_hash=self.hashes[first - 1] if first else None,
            token_ids=self.tokens[first * self.block_size : last * self.block_size].tolist(),
            block_size=self.block_size,
            lora_id=None if self.adapter is None else self.adapter.number,
            lora_name=None if self.adapter is None else self.adapter.name,
            extra_keys=[(name if block else name + salt) or None for block in range(first, last)],
        )

    def _hash_full_blocks(self) -> None:
        size, first = self.block_size, len(self.hashes)
        data = memoryview(self.tokens[first * size :].tobytes())
        parent = self.hashes[-1].to_bytes(8, "little") if first else self._seed()
        for start in range(0, len(data) - size * 4 + 1, size * 4):
            state = sha256(parent)
            state.update(data[start : start + size * 4])
            parent = state.digest()[:8]
            self.hashes.append(int.from_bytes(parent, "little"))

    def _seed(self) -> bytes:
        return b"" if self.salt is None and self.adapter is None else repr((self.adapter, self.salt)).encode()


class BlockHit(NamedTuple):
    """The cached blocks of a prefix."""

    blocks: list[int]
    tokens: int


_NO_HIT = BlockHit([], 0)


class PagedPrefixCache:
    """`num_blocks` blocks of `block_size` tokens. Block 0 is never used (vLLM's null block)."""

    def __init__(
        self, num_blocks: int, block_size: int, cpu: CpuTier | None = None, *, prefix_caching: bool = True
    ) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"expected at least 2 blocks of at least 1 token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._users = [0] * num_blocks
        self._hashes: list[int | None] = [None] * num_blocks
        self._copies: dict[int, list[int]] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._cpu = cpu
        self._prefix_caching = prefix_caching
        self._events: list[Event] = []

    @property
    def capacity(self) -> int:
        """Tokens that fit at the same time."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def usage(self) -> float:
        """Share of blocks that running requests use, 0 to 1. Blocks that are only cached do not count."""
        return 1 - len(self._free) / (self.num_blocks - 1)

    def sequence(
        self,
        tokens: TokenIds,
        salt: str | None = None,
        adapter: Adapter | None = None,
        _extra_key: str | None = None,
    ) -> Sequence:
        """A new sequence without blocks. vLLM does not know extra keys of clients."""
        return Sequence(tokens, self.block_size, salt, adapter)

    def lookup(self, sequence: Sequence) -> BlockHit:
        """Find the cached blocks that hold the longest prefix of `sequence`.

        At most `(n - 1) // block_size` for n tokens: the last token is always computed.
        """
        found: list[int] = []
        for block_hash in sequence.hashes[: (len(sequence.tokens) - 1) // self.block_size]:
            copies = self._copies.get(block_hash)
            if copies is None:
                break
            found.append(copies[0])
        return BlockHit(found, len(found) * self.block_size)

    def load(self, sequence: Sequence, hit: BlockHit) -> int:
        """Count the tokens after the hit that the CPU tier has and allocation will load back."""
        if self._cpu is None:
            return 0
        last = (len(sequence.tokens) - 1) // self.block_size
        loadable = list(takewhile(self._cpu.__contains__, sequence.hashes[len(hit.blocks) : last]))
        self._cpu.use(loadable)
        return len(loadable) * self.block_size

    def report(self, sequence: Sequence, hit: BlockHit) -> None:
        """Report the blocks of the hit, which are cached already, as if they were stored now."""
        if hit.blocks:
            self._events.append(sequence.stored_event(0, len(hit.blocks)))

    def fits(self, sequence: Sequence, hit: BlockHit) -> bool:
        """Whether all of `sequence` fits now, given the blocks that `lookup` found."""
        return self._lacking(sequence, len(sequence.tokens), hit.blocks) <= len(self._free)

    def allocate(self, sequence: Sequence, computed: int, hit: BlockHit | None = None) -> bool:
        """Allocate blocks for the first `computed` tokens of `sequence`, and make the full ones reusable.

        `hit` is the result of `lookup`, for a sequence without blocks. Returns False, and changes nothing, when there
        are too few free blocks.
        """
        lacking = self._lacking(sequence, computed, (hit or _NO_HIT).blocks)
        if lacking > len(self._free):
            return False
        if hit is not None:
            self._share(hit.blocks)
            sequence.blocks.extend(hit.blocks)
            sequence.stored = len(hit.blocks)
        for _ in range(-(-computed // self.block_size) - len(sequence.blocks)):
            sequence.blocks.append(self._take())
        full = computed // self.block_size
        if self._prefix_caching and full > sequence.stored:
            self._store(sequence, full)
        return True

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """Blocks are reusable as soon as they are allocated."""

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Free the sequence's blocks. Cached ones stay until they are reused, tail first."""
        for block in reversed(sequence.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
        # A block without a hash serves no other request: reuse it before any cached one.
        for block in sequence.blocks[sequence.stored :]:
            self._free.move_to_end(block, last=False)
        sequence.blocks = []
        sequence.stored = 0

    def reset(self) -> bool:
        """Clear the cache. Returns False, and changes nothing, while any block is in use."""
        if len(self._free) < self.num_blocks - 1:
            return False
        self._copies.clear()
        if self._cpu is not None:
            self._cpu.clear()
        self._hashes = [None] * self.num_blocks
        self._events.append(AllBlocksCleared())
        return True

    def take_events(self) -> list[Event]:
        """Return the events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def _lacking(self, sequence: Sequence, tokens: int, hit: Items[int]) -> int:
        idle = sum(not self._users[block] for block in hit)
        return -(-tokens // self.block_size) - len(sequence.blocks) - len(hit) + idle

    def _share(self, blocks: Items[int]) -> None:
        for block in blocks:
            if not self._users[block]:
                del self._free[block]
            self._users[block] += 1

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._users[block] = 1
        block_hash = self._hashes[block]
        if block_hash is not None:
            self._hashes[block] = None
            copies = self._copies[block_hash]
            copies.remove(block)
            if not copies:
                del self._copies[block_hash]
                if self._cpu is not None:
                    self._events += self._cpu.evicted(block_hash)
            self._events.append(BlockRemoved(block_hashes=[block_hash]))
        return block

    def _store(self, sequence: Sequence, full: int) -> None:
        first = sequence.stored
        for position in range(first, full):
            block, block_hash = sequence.blocks[position], sequence.hashes[position]
            self._hashes[block] = block_hash
            self._copies.setdefault(block_hash, []).append(block)
        self._events.append(sequence.stored_event(first, full))
        if self._cpu is not None:
            blocks = [sequence.stored_event(position, position + 1) for position in range(first, full)]
            self._events += self._cpu.stored(blocks)
        sequence.stored = full
