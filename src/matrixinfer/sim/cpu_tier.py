"""The tier below the GPU's cache, as vLLM's off-loading to the CPU: what had to leave the GPU is still there.

Blocks are copied as soon as they are stored on the GPU, or, where that is `lazy`, when they have to leave it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from matrixinfer.sim.events import BlockRemoved, BlockStored, Event


class CpuTier:
    """Keeps `num_blocks` blocks, of which the least recently used goes first, a request's tail before its head.

    With `bare_events` its events name blocks without their tokens, as some of vLLM's off-load connectors do.
    """

    def __init__(self, num_blocks: int, *, lazy: bool = False, bare_events: bool = False) -> None:
        self._num_blocks = num_blocks
        self._lazy = lazy
        self._bare = bare_events
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._above: dict[int, BlockStored] = {}  # the GPU's blocks, where they will be copied from there

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._blocks

    def use(self, block_hashes: Sequence[int]) -> None:
        """Note that the blocks of one prompt are read, or have just come."""
        for block_hash in reversed(block_hashes):
            if block_hash in self._blocks:
                self._blocks.move_to_end(block_hash)

    def stored(self, blocks: Sequence[BlockStored]) -> list[Event]:
        """Blocks, told one by one, are on the GPU from now on. Returns what changes here."""
        if self._lazy:
            self._above.update((block.block_hashes[0], block) for block in blocks)
            return []
        events = self._keep(blocks)
        self.use([block.block_hashes[0] for block in blocks])
        return events

    def evicted(self, block_hash: int) -> list[Event]:
        """The last copy of a block leaves the GPU. Returns what changes here."""
        return self._keep([self._above.pop(block_hash)]) if self._lazy else []

    def clear(self) -> None:
        """Drop everything."""
        self._blocks.clear()
        self._above.clear()

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
            events.append(self._told(block))
        return events

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
