"""The tier below the GPU's cache: blocks evicted there stay here, until others push them out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from matrixinfer.sim.events import BlockRemoved, BlockStored, Event


class CpuTier:
    """Keeps `num_blocks` blocks, of which the least recently used goes first.

    With `bare_events` its events name blocks without their tokens, as some of vLLM's off-load connectors do.
    """

    def __init__(self, num_blocks: int, *, bare_events: bool = False) -> None:
        self._num_blocks = num_blocks
        self._bare = bare_events
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._blocks

    def use(self, block_hashes: Iterable[int]) -> None:
        """Note that blocks that it holds are read."""
        for block_hash in block_hashes:
            self._blocks.move_to_end(block_hash)

    def keep(self, block: BlockStored) -> list[Event]:
        """Take one block that leaves the GPU, told as it was stored there. Returns what that changes."""
        (block_hash,) = block.block_hashes
        if not self._num_blocks:
            return []
        if block_hash in self._blocks:
            self._blocks.move_to_end(block_hash)
            return []
        events: list[Event] = []
        if len(self._blocks) == self._num_blocks:
            oldest, _ = self._blocks.popitem(last=False)
            events.append(BlockRemoved(block_hashes=[oldest], medium="CPU"))
        self._blocks[block_hash] = None
        events.append(self._told(block))
        return events

    def clear(self) -> None:
        """Drop everything."""
        self._blocks.clear()

    def _told(self, block: BlockStored) -> BlockStored:
        if not self._bare:
            return msgspec.structs.replace(block, medium="CPU")
        return BlockStored(
            block_hashes=block.block_hashes,
            parent_block_hash=None,
            token_ids=[],
            block_size=0,
            medium="CPU",
            extra_keys=None,
            kv_cache_spec_kind=None,
        )
