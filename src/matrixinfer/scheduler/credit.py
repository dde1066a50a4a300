"""What the blocks count for that an endpoint holds, or is believed to hold.

A block in the device's memory that events tell of counts one. Less counts what must be loaded from a slower tier, what is
indexed but doubted, and what was only recent there. Blocks on their way (`Candidate.pending_blocks`) are counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from matrixinfer.config import WeightsConfig
from matrixinfer.scheduler.framework import Trust


def cached_credit(
    trust: Trust, weights: WeightsConfig, *, match: int, tiers: Sequence[int], pending: int, recent: int
) -> float:
    """What `match` blocks, of which the first `tiers[0]` are on the device, count for, and what was recent besides.

    `tiers` are counts from the start, up to each faster tier than the slowest; none where there is but one. `pending`
    blocks follow the match, and `recent` begins with the prompt.
    """
    if trust == "none":
        return weights.unproven * max(0, recent - pending)
    total, before = 0.0, 0
    for blocks, weight in zip((*tiers, match), (1.0, weights.host, weights.storage), strict=False):
        total += weight * max(0, blocks - before)
        before = max(before, blocks)
    if trust == "exact":
        return total
    beyond = weights.unproven * max(0, recent - match - pending)
    return (total if trust == "partial" else weights.unproven * total) + beyond
