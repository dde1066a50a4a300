"""What the blocks count for that an endpoint holds, or is believed to hold.

A block in the device's memory that events tell of counts one. Less counts what must be loaded from a slower tier, what is
indexed but doubted, and what was only sent there. Blocks on their way (`Candidate.assumed_blocks`) are counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from matrixinfer.config import WeightsConfig
from matrixinfer.scheduler.framework import Trust


def worth(trust: Trust, weights: WeightsConfig, *, match: int, tiers: Sequence[int], assumed: int, sent: int) -> float:
    """What `match` blocks, of which the first `tiers[0]` are on the device, count for, and what was sent besides.

    `tiers` are counts from the start, up to each faster tier than the slowest; none where there is but one. `assumed`
    blocks follow the match, and `sent` begins with the prompt.
    """
    if trust == "none":
        return weights.unproven * max(0, sent - assumed)
    total, before = 0.0, 0
    for blocks, weight in zip((*tiers, match), (1.0, weights.host, weights.storage), strict=False):
        total += weight * max(0, blocks - before)
        before = max(before, blocks)
    if trust == "exact":
        return total
    beyond = weights.unproven * max(0, sent - match - assumed)
    return (total if trust == "partial" else weights.unproven * total) + beyond
