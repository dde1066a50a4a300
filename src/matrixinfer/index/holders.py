"""How far the holders of a chain's first block hold the rest of it.

The result is pairs: a set of pods, and how many blocks from the start each of them holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from matrixinfer.index.tree import Tree

Held: TypeAlias = list[tuple[int, int]]


def walk(tree: Tree, hashes: Sequence[int], holders: int) -> Held:
    """Look at one block after the other, for any blocks."""
    pods, shards = tree.pods, len(tree.pods)
    held: Held = []
    position = 0
    for block in hashes:
        still = pods[block % shards].get(block, 0) & holders
        if still != holders:
            if position:
                held.append((holders & ~still, position))
            if not still:
                return held
            holders = still
        position += 1
    held.append((holders, position))
    return held


def gallop(tree: Tree, hashes: Sequence[int], holders: int) -> Held:
    """Find the positions at which holders drop out by exponential search and bisection.

    This works where the holders of a block hold all blocks before it: the set only shrinks along the chain.
    """
    pods, shards = tree.pods, len(tree.pods)
    held: Held = []
    low, last = 0, len(hashes) - 1
    block = hashes[0]
    holders = pods[block % shards].get(block, 0) & holders
    while holders and low < last:
        high = min(2 * low + 1, last)
        block = hashes[high]
        still = pods[block % shards].get(block, 0) & holders
        if still != holders:
            _bisect(tree, hashes, low, holders, high, still, held)
        low, holders = high, still
    if holders:
        held.append((holders, low + 1))
    return held


def _bisect(tree: Tree, hashes: Sequence[int], low: int, at_low: int, high: int, at_high: int, held: Held) -> None:
    """Add the pods that hold block `low` but not block `high`."""
    pods, shards = tree.pods, len(tree.pods)
    while high - low > 1:
        middle = (low + high) // 2
        block = hashes[middle]
        at_middle = pods[block % shards].get(block, 0) & at_low
        if at_middle == at_low:
            low = middle
        elif at_middle == at_high:
            high = middle
        else:
            _bisect(tree, hashes, low, at_low, middle, at_middle, held)
            low, at_low = middle, at_middle
    held.append((at_low & ~at_high, high))
