"""How sure a difference is that was seen on several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

FEWEST = 3
"""Pairs below which nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A value against that of the default, as shares of it: -0.2 is a fifth less."""

    seeds: int
    mean: float
    low: float
    """With `high`: where the true mean is, with 95 % confidence; infinities where there are too few seeds."""
    high: float

    @property
    def verdict(self) -> Literal["better", "worse", "no difference shown"]:
        """Less is better."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "no difference shown"


def difference(values: Sequence[float], defaults: Sequence[float], *, compared: int = 1) -> Difference:
    """Compare values seed by seed with those of the default. `compared`: how many settings had the chance to be best.

    Ratios are averaged, since seeds differ in how much load they bring. The interval is Student's, at a level that holds
    for all that are compared together (Bonferroni).
    """
    logs = [math.log(value / default) for value, default in zip(values, defaults, strict=True)]
    count = len(logs)
    mean = sum(logs) / count if logs else 0.0
    if count < FEWEST:
        return Difference(seeds=count, mean=math.expm1(mean), low=-math.inf, high=math.inf)
    variance = sum((each - mean) ** 2 for each in logs) / (count - 1)
    half = quantile(1 - 0.025 / max(1, compared), count - 1) * math.sqrt(variance / count)
    return Difference(seeds=count, mean=math.expm1(mean), low=math.expm1(mean - half), high=math.expm1(mean + half))


def quantile(share: float, freedom: int) -> float:
    """Student's t: the value below which `share` of its distribution lies, for shares above a half."""
    low, high = 0.0, 1.0
    while _below(high, freedom) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < share else (low, middle)
    return high


def _below(value: float, freedom: int) -> float:
    """Student's distribution function above 0, integrated over the angle: t = √ν tan θ."""
    angles = np.linspace(0.0, math.atan(value / math.sqrt(freedom)), 2001)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))
    heights = np.cos(angles) ** (freedom - 1)
    step = float(angles[1])
    return 0.5 + scale * step * float(heights.sum() - (heights[0] + heights[-1]) / 2)
