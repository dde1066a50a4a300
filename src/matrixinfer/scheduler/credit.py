"""The credit for blocks that an endpoint holds, or probably holds.

A block in the device's memory that the engine's events report counts 1. A block counts less if it must be loaded from a
slower tier, if it is indexed but in doubt, or if it was only sent there lately. Pending blocks
(`Candidate.pending_blocks`) are added elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from matrixinfer.config import WeightsConfig
from matrixinfer.scheduler.framework import Trust


def cached_credit(
    trust: Trust,
    weights: WeightsConfig,
    *,
    match: int,
    tiers: Sequence[int],
    pending: int,
    recent: int,
    guessed: float = 0.0,
) -> float:
    """The credit for the first `match` blocks of a prompt, the `recent` blocks beyond them, and `guessed` further ones.

    `tiers` says how many blocks, from the start, are on the device, and how many are there or on the next faster tier;
    it is empty if there is only one tier. `pending` blocks follow the match; `recent` counts from the prompt's start.
    `guessed` blocks were sent lately as well, as the prompt's bytes show (`Candidate.guessed_tokens`).
    """
    if trust == "none":
        return weights.unproven * (max(0, recent - pending) + guessed)
    total, before = 0.0, 0
    for blocks, weight in zip((*tiers, match), (1.0, weights.host, weights.storage), strict=False):
        total += weight * max(0, blocks - before)
        before = max(before, blocks)
    if trust == "exact":
        return total + weights.unproven * guessed
    beyond = weights.unproven * (max(0, recent - match - pending) + guessed)
    return (total if trust == "partial" else weights.unproven * total) + beyond
