"""A paged prefix cache that behaves like vLLM's (block pool, coordinator and managers of 0.32).

It copies the behaviour, including the order of evictions:
- A block is named by a hash of all tokens up to its end.
- A request uses the cached blocks of its prefix, and free ones for the rest. Each attention group has its own.
- A full block, of prompt or reply, becomes reusable when it is scheduled; in windows and states only those that a later
  prompt can need.
- A block that two requests compute at the same time is stored twice under one hash.
- Unused blocks wait in a queue and are reused from its head: least recently used first, a request's tail before its head.

Blocks that leave the GPU may stay in a CPU tier, and are loaded back when a prompt needs them; with one group only.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import takewhile
from typing import NamedTuple

from matrixinfer.blocks import TokenIds
from matrixinfer.sim.attention import MAMBA, Group, Layout
from matrixinfer.sim.block_pool import NO_BLOCK, BlockPool, Key
from matrixinfer.sim.cpu_tier import CpuTier
from matrixinfer.sim.events import BlockStored, Event
from matrixinfer.sim.group_hits import Finder
from matrixinfer.sim.media import MediumRun
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.sequence import Sequence


class BlockHit(NamedTuple):
    """The cached blocks of a prefix, of each group; `NO_BLOCK` where the group needs none."""

    blocks: list[list[int]]
    tokens: int


class PagedPrefixCache:
    """`num_blocks` blocks of `block_size` tokens, or of those that `layout` says. Block 0 is never used."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        cpu: CpuTier | None = None,
        *,
        prefix_caching: bool = True,
        layout: Layout | None = None,
    ) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"expected at least 2 blocks of at least 1 token, got {num_blocks} of {block_size}")
        self._layout = layout or Layout(groups=(Group(block_size=block_size),))
        self._groups = self._layout.groups
        self.block_size = self._layout.unit
        self._hash_size = self._layout.hash_size
        self._dropping = self._layout.dropping
        self._has_states = any(group.kind == MAMBA for group in self._groups)
        self._pool = BlockPool(num_blocks, cpu)
        self._finder = Finder(self._layout)
        self._cpu = cpu
        self._prefix_caching = prefix_caching
        self._new_states: set[Key] = set()  # cached in this step: their contents are not there yet

    @property
    def capacity(self) -> int:
        """Tokens that fit at the same time."""
        return self._layout.capacity(self._pool.num_blocks - 1)

    @property
    def usage(self) -> float:
        """Share of blocks that running requests use, 0 to 1. Blocks that are only cached do not count."""
        return self._pool.usage

    def cached_hashes(self) -> Iterator[int]:
        """The hashes of the cached blocks of all groups."""
        return (key.block_hash for key in self._pool)

    def sequence(
        self,
        tokens: TokenIds,
        salt: str | None = None,
        adapter: Adapter | None = None,
        _extra_key: str | None = None,
        media: Items[MediumRun] = (),
    ) -> Sequence:
        """A new sequence without blocks. vLLM does not know extra keys of clients."""
        layout = self._layout
        return Sequence(
            tokens,
            layout.hash_size,
            salt,
            adapter,
            groups=len(self._groups),
            lookahead=layout.lookahead,
            media=media,
        )

    def new_step(self) -> bool:
        """A step begins. Returns whether something that did not fit may fit now, although nothing was released."""
        has_waited = bool(self._new_states)
        self._new_states.clear()
        return has_waited

    def chunk(self, sequence: Sequence, start: int, count: int, most: int) -> int:
        """How many of the next `count` tokens after `start` one step computes; the largest step has `most`.

        States are cached at the ends of chunks, so with mamba chunks end where a state is to be cached.
        """
        if not self._has_states:
            return count
        total, unit = len(sequence.tokens), self.block_size
        prefill_end, end = max(sequence.prompt, total - 1), start + count
        if start >= prefill_end:
            return count
        if end < prefill_end:
            aligned = end // unit * unit
            if aligned > start or unit <= most:
                end = aligned
        junction = start + (sequence.junction - start) // unit * unit if start < sequence.junction < end else 0
        stops = [junction, self._last_state(total)]
        if start % unit:
            stops.append((start // unit + 1) * unit)
        end = min((stop for stop in stops if start < stop < end), default=end)
        return max(0, end - start)

    def lookup(self, sequence: Sequence) -> BlockHit:
        """Find the cached blocks of the longest prefix of `sequence` that every group can reuse."""
        hashes, size = sequence.hashes, self._hash_size

        def find(groups: list[int], end: int) -> list[int] | None:
            return self._pool.find(groups, hashes[end // size - 1])

        hit = self._finder.longest(len(sequence.tokens), sequence.hashed, find)
        sequence.junction = hit.longest if hit.longest > hit.tokens else 0
        return BlockHit(hit.blocks, hit.tokens)

    def load(self, sequence: Sequence, hit: BlockHit) -> int:
        """Count the tokens after the hit that the CPU tier has and allocation will load back."""
        if self._cpu is None:
            return 0
        last = (len(sequence.tokens) - 1) // self.block_size
        loadable = list(takewhile(self._cpu.__contains__, sequence.hashes[len(hit.blocks[0]) : last]))
        self._cpu.use(loadable)
        return len(loadable) * self.block_size

    def report(self, sequence: Sequence, hit: BlockHit) -> None:
        """Report the blocks of the hit, which are cached already, as if they were stored now."""
        for number, (group, blocks) in enumerate(zip(self._groups, hit.blocks, strict=True)):
            if blocks:
                self._pool.events.append(sequence.stored_event(0, len(blocks), group, number))

    def fits(self, sequence: Sequence, hit: BlockHit) -> bool:
        """Whether all of `sequence` fits now, given the blocks that `lookup` found."""
        return self._has_room(sequence, len(sequence.tokens), hit)

    def allocate(self, sequence: Sequence, computed: int, hit: BlockHit | None = None) -> bool:
        """Allocate blocks for the first `computed` tokens of `sequence`, and make the full ones reusable.

        `hit` is the result of `lookup`, for a sequence without blocks. Returns False when there are too few free blocks;
        the sequence has then given up only blocks that it does not read any more.
        """
        before = hit.tokens if hit is not None else sequence.allocated
        self._give_up_skipped(sequence, before)
        if not self._has_room(sequence, computed, hit):
            return False
        if hit is not None:
            for number, (group, blocks) in enumerate(zip(self._groups, hit.blocks, strict=True)):
                skipped = group.skipped(before) // group.block_size
                kept = [NO_BLOCK] * skipped + blocks[skipped:]
                self._pool.share(kept)
                sequence.blocks[number] = kept
                sequence.stored[number] = len(kept)
        for number, group in enumerate(self._groups):
            self._extend(sequence, number, -(-computed // group.block_size))
        sequence.allocated = computed
        if self._prefix_caching:
            for number in range(len(self._groups)):
                self._store(sequence, number, min(computed, len(sequence.tokens)))
        return True

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """Blocks are reusable as soon as they are allocated."""

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Free the sequence's blocks. Cached ones stay until they are reused, tail first."""
        for blocks in sequence.blocks:
            self._pool.give_back(reversed(blocks))
        sequence.forget_blocks()

    def reset(self) -> bool:
        """Clear the cache. Returns False, and changes nothing, while any block is in use."""
        return self._pool.reset()

    def take_events(self) -> list[Event]:
        """Return the events since the last call, in order."""
        events, self._pool.events = self._pool.events, []
        return events

    def _has_room(self, sequence: Sequence, tokens: int, hit: BlockHit | None) -> bool:
        lacking = 0
        for number, group in enumerate(self._groups):
            required, held = -(-tokens // group.block_size), len(sequence.blocks[number])
            if hit is None:
                missing = max(0, required - held)
                lacking += min(1, missing) if group.kind == MAMBA else missing
                continue
            found = hit.blocks[number]
            if group.kind == MAMBA:
                # The state that a request computes in this step cannot be read in it.
                if found and not self._new_states.isdisjoint(self._pool.keys_of(found[-1])):
                    return False
                lacking += min(1, max(0, required - len(found))) + self._pool.idle(found)
            else:
                skipped = group.skipped(hit.tokens) // group.block_size
                lacking += max(0, required - max(skipped, len(found))) + self._pool.idle(found[skipped:])
        return lacking <= len(self._pool)

    def _give_up_skipped(self, sequence: Sequence, computed: int) -> None:
        """Give back the blocks that the tokens after the first `computed` do not read."""
        for number, group in enumerate(self._groups):
            blocks = sequence.blocks[number]
            last = min(group.skipped(computed) // group.block_size, len(blocks))
            given = []
            for block in range(last - 1, -1, -1):
                if blocks[block] == NO_BLOCK:
                    if group.kind != MAMBA:
                        break
                    continue
                given.append(blocks[block])
                blocks[block] = NO_BLOCK
            self._pool.give_back(given)
            state = sequence.states[number]
            if state is not None and state < -(-computed // group.block_size) - 1:
                self._pool.give_back([blocks[state]])
                blocks[state] = NO_BLOCK

    def _extend(self, sequence: Sequence, number: int, required: int) -> None:
        blocks = sequence.blocks[number]
        if self._groups[number].kind == MAMBA and required > len(blocks):
            # Only the last state is computed; the one that it is computed from is read in this step.
            sequence.states[number] = len(blocks) - 1 if blocks else None
            blocks += [NO_BLOCK] * (required - 1 - len(blocks))
        blocks += [self._pool.take() for _ in range(required - len(blocks))]

    def _store(self, sequence: Sequence, number: int, tokens: int) -> None:
        """Make the full blocks among the first `tokens` tokens reusable, as far as a later prompt can need them."""
        group, blocks, first = self._groups[number], sequence.blocks[number], sequence.stored[number]
        tokens = self._storable(number, tokens)
        full = min(tokens, sequence.hashed) // group.block_size
        if full > first:
            boundaries = self._layout.boundaries(sequence.prompt, sequence.junction)
            wanted = self._layout.kept(number, first, full, boundaries)
            kept = [block for block in range(first, full) if wanted[block - first] and blocks[block] != NO_BLOCK]
            for block in kept:
                key = Key(number, sequence.hash_at((block + 1) * group.block_size))
                self._pool.uncache(blocks[block])  # what it was cached under while it was not full
                self._pool.cache(blocks[block], key)
                if group.kind == MAMBA:
                    self._new_states.add(key)
            self._pool.events.append(sequence.stored_event(first, full, group, number, kept))
            self._copy_to_cpu(sequence, first, full)
            sequence.stored[number] = full
        if group.is_full and group.block_size != self._hash_size:
            self._store_end(sequence, number, tokens)
        if group.kind == MAMBA and not self._layout.lookahead and tokens == self._last_state(sequence.prompt) > 0:
            # vLLM 0.32 takes the prompt's last state for new in every step that goes no further; 0.33 does not.
            self._new_states.update(self._pool.keys_of(blocks[tokens // group.block_size - 1]))

    def _storable(self, number: int, tokens: int) -> int:
        """How many of the first `tokens` tokens a later hit can reach."""
        if len(self._groups) == 1:
            return tokens
        aligned = tokens // self.block_size * self.block_size
        if aligned and number in self._dropping:
            return min(tokens, aligned + self._groups[number].block_size)
        return aligned

    def _store_end(self, sequence: Sequence, number: int, tokens: int) -> None:
        """Make a block findable by the last hash of the prompt within it."""
        group, size = self._groups[number], self._hash_size
        limit = sequence.prompt - (number not in self._dropping)
        end = min(limit // size * size, sequence.hashed)
        block = end // group.block_size
        if not 0 < end <= tokens or not end % group.block_size or block >= len(sequence.blocks[number]):
            return
        key = Key(number, sequence.hash_at(end))
        if key in self._pool.keys_of(sequence.blocks[number][block]):
            return
        self._pool.cache(sequence.blocks[number][block], key)
        fine = Group(kind=group.kind, block_size=size, span=group.span)
        self._pool.events.append(sequence.stored_event(end // size - 1, end // size, fine, number))

    def _copy_to_cpu(self, sequence: Sequence, first: int, full: int) -> None:
        if self._cpu is not None:
            copies: list[BlockStored] = [sequence.stored_event(block, block + 1) for block in range(first, full)]
            self._pool.events += self._cpu.stored(copies)

    def _last_state(self, tokens: int) -> int:
        """The last place of a prompt whose state a later one can read."""
        unit = self.block_size
        if self._layout.drop:
            return max(0, tokens // unit * unit - unit)
        return (tokens - max(1, self._layout.lookahead)) // unit * unit
