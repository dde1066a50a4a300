"""A cache tier on the CPU, like vLLM's offloading: it keeps blocks that the GPU evicts.

Blocks are copied when they are stored on the GPU or, if the tier is `lazy`, when the GPU evicts them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from matrixinfer.sim.events import BlockRemoved, BlockStored, Event


class CpuTier:
    """Keeps `num_blocks` blocks. Evicts the least recently used first, a request's tail before its head.

    With `bare_events`, its events name blocks without their tokens, as those of some of vLLM's connectors do.
    """

    def __init__(self, num_blocks: int, *, lazy: bool = False, bare_events: bool = False) -> None:
        self._num_blocks = num_blocks
        self._lazy = lazy
        self._bare = bare_events
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._on_gpu: dict[int, BlockStored] = {}  # blocks to copy when the GPU evicts them; empty unless lazy

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._blocks

    def use(self, block_hashes: Sequence[int]) -> None:
        """Mark the blocks of one prompt as recently used."""
        for block_hash in reversed(block_hashes):
            if block_hash in self._blocks:
                self._blocks.move_to_end(block_hash)

    def stored(self, blocks: Sequence[BlockStored]) -> list[Event]:
        """Handle blocks that were stored on the GPU, one event per block. Returns the events of this tier."""
        if self._lazy:
            self._on_gpu.update((block.block_hashes[0], block) for block in blocks)
            return []
        events = self._keep(blocks)
        self.use([block.block_hashes[0] for block in blocks])
        return events

    def evicted(self, block_hash: int) -> list[Event]:
        """Handle a block whose last copy leaves the GPU. Returns the events of this tier."""
        return self._keep([self._on_gpu.pop(block_hash)]) if self._lazy else []

    def clear(self) -> None:
        """Drop everything."""
        self._blocks.clear()
        self._on_gpu.clear()

    def _keep(self, blocks: Iterable[BlockStored]) -> list[Event]:
        events: list[Event] = []
        for block in blocks:
            (block_hash,) = block.block_hashes
            if block_hash in self._blocks:
                self._blocks.move_to_end(block_hash)
                continue
            if len(self._blocks) == self._num_blocks:
                oldest, _ = self._blocks.popitem(last=False)
                events.append(BlockRemoved(block_hashes=[oldest], medium="CPU"))
            self._blocks[block_hash] = None
            events.append(self._event(block))
        return events

    def _event(self, block: BlockStored) -> BlockStored:
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
