"""Sums of prompt tokens by what became of them, for one stretch of time. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from matrixinfer.traffic.ladder.reuse import Found, Visit

_STEPS_PER_DOUBLING = 4
WhyGone: TypeAlias = Callable[[Visit], str]
"""Says why blocks that were touched last by this visit are at no pod, though the caches could have kept them: a cause."""
LOST = "lost:"
"""Prefix of the sums by cause that are known exactly."""
SAMPLED = "sampled:"
"""Prefix of the sums that come from sampled blocks, before they are adjusted by `lost`."""


@dataclass(slots=True)
class Tally:
    """What happened to the prompts of some requests.

    `sums` are in tokens: `prompt`; `lost:` causes that are known exactly; `beyond`, which the pod that held most of each prompt did
    not hold, of whole blocks; `sampled`, the same by the sampled blocks; and `sampled:` causes of it.
    """

    sums: dict[str, float] = field(default_factory=dict)
    excess: dict[int, float] = field(default_factory=dict)
    """Evicted tokens by how much larger the caches had to be (`excess_step`), weighted as `sampled:evicted`."""
    rate: float = 1.0
    """The smallest share of blocks that was sampled."""
    different: int = 0
    """How many sampled blocks the tracker remembered, at most."""
    capacity: int | None = None
    pods: int = 0
    """Of the last request: what all its pods' caches hold together, and how many those are."""

    def __getitem__(self, name: str) -> float:
        return self.sums.get(name, 0.0)

    def add(self, name: str, tokens: float) -> None:
        """Count tokens."""
        if tokens:
            self.sums[name] = self.sums.get(name, 0.0) + tokens

    def include(self, other: Tally) -> None:
        """Add a later stretch of time."""
        for name, tokens in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + tokens
        for step, tokens in other.excess.items():
            self.excess[step] = self.excess.get(step, 0.0) + tokens
        self.rate = min(self.rate, other.rate)
        self.different = max(self.different, other.different)
        self.capacity, self.pods = other.capacity, other.pods

    def look(self, found: Found, block_size: int, *, beyond: int, capacity: int | None, why: WhyGone) -> None:
        """Count what became of `beyond` tokens of a prompt that no pod held, by the sampled blocks among them.

        `capacity` is what all caches hold together; `why` says why a block is gone that they could have kept.
        """
        weight = block_size / found.rate
        self.rate = min(self.rate, found.rate)
        self.different = max(self.different, found.different)
        self.add("beyond", beyond)
        self.add("sampled", found.blocks * weight)
        self.add("sampled_blocks", found.blocks)
        for reused in found.reused:
            if capacity is None:
                self.add(f"{SAMPLED}capacity_unknown", reused.blocks * weight)
                continue
            kept = min(reused.blocks, max(0, int(capacity / weight) - reused.nearer))
            if kept:
                self.add(SAMPLED + why(reused.last), kept * weight)
            if kept < reused.blocks:
                gone = (reused.blocks - kept) * weight
                step = excess_step((reused.nearer + reused.blocks) * weight - capacity)
                self.add(f"{SAMPLED}evicted", gone)
                self.excess[step] = self.excess.get(step, 0.0) + gone


def lost(tally: Tally) -> dict[str, float]:
    """Tokens by cause. What was sampled is adjusted to what is known exactly: how many tokens it stands for."""
    factor = tally["beyond"] / tally["sampled"] if tally["sampled"] else 0.0
    losses: dict[str, float] = {}
    seen = 0.0
    for name, tokens in tally.sums.items():
        if name.startswith(SAMPLED):
            losses[name.removeprefix(SAMPLED)] = tokens * factor
            seen += tokens * factor
        elif name.startswith(LOST):
            losses[name.removeprefix(LOST)] = tokens
    unseen = tally["beyond"] - seen
    if unseen > 0:
        name = "new" if tally["sampled"] else "unsampled"
        losses[name] = losses.get(name, 0.0) + unseen
    return losses


def excess_step(tokens: float) -> int:
    """The class of a number of tokens, in steps of a quarter of a doubling."""
    return max(0, math.ceil(math.log2(max(1.0, tokens)) * _STEPS_PER_DOUBLING))


def excess_tokens(step: int) -> float:
    """The most tokens of a class."""
    return float(2.0 ** (step / _STEPS_PER_DOUBLING))


def total(tallies: Iterable[Tally]) -> Tally:
    """All of them together, in the order of time."""
    whole = Tally()
    for each in tallies:
        whole.include(each)
    return whole
