"""What is counted about requests in one stretch of time. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

K = TypeVar("K", int, str)

_STEP = 1.2
"""Times to first byte are counted in bins, each this much wider than the one before: a percentile is right within 10 %."""
_LAST_BIN = 72
"""Ends at 500 s."""


@dataclass(slots=True)
class EndpointSums:
    """The part of one endpoint."""

    requests: int = 0
    prompt_tokens: int = 0
    """As the engine counts them, in answers that report cached tokens."""
    cached_tokens: int = 0


@dataclass(slots=True)
class Sums:
    """Counts of requests whose answer ended, and of the decisions for `round_robin_…`."""

    requests: int = 0
    errors: int = 0
    """No answer, or one with a status of 500 or above."""
    predicted_of: int = 0
    """Prompt tokens of the requests for which a hit could be predicted."""
    predicted_tokens: int = 0
    reported_of: int = 0
    """Prompt tokens of the requests whose answer reports cached tokens."""
    reported_tokens: int = 0
    silent_tokens: int = 0
    """Prompt tokens of the requests whose engine reports no cached tokens."""
    saved_seconds: float = 0.0
    round_robin_of: int = 0
    round_robin_tokens: int = 0
    ttft: dict[int, int] = field(default_factory=dict)
    """Bin to number of answers."""
    endpoints: dict[str, EndpointSums] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)

    def first_byte(self, milliseconds: float) -> None:
        """An answer began."""
        number = min(_LAST_BIN, max(0, math.ceil(math.log(max(milliseconds, 1.0), _STEP))))
        self.ttft[number] = self.ttft.get(number, 0) + 1

    def percentile(self, share: float) -> float | None:
        """Milliseconds to the first byte that this share of the answers took at most; None if there is no answer."""
        total = sum(self.ttft.values())
        if not total:
            return None
        left = share * total
        for number in sorted(self.ttft):
            count = self.ttft[number]
            if left <= count:
                low = 0.0 if number == 0 else _STEP ** (number - 1)
                return low + (_STEP**number - low) * left / count
            left -= count
        return float(_STEP ** max(self.ttft))

    def endpoint(self, name: str) -> EndpointSums:
        """The part of an endpoint."""
        found = self.endpoints.get(name)
        if found is None:
            found = self.endpoints[name] = EndpointSums()
        return found

    def add(self, other: Sums, sign: int = 1) -> None:
        """Add what another stretch of time has counted, or take it away with a `sign` of -1."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + sign * getattr(other, name))
        _merge(self.ttft, other.ttft, sign)
        _merge(self.models, other.models, sign)
        for name, each in other.endpoints.items():
            mine = self.endpoint(name)
            mine.requests += sign * each.requests
            mine.prompt_tokens += sign * each.prompt_tokens
            mine.cached_tokens += sign * each.cached_tokens
            if not mine.requests:
                del self.endpoints[name]


_NUMBERS = (
    "requests",
    "errors",
    "predicted_of",
    "predicted_tokens",
    "reported_of",
    "reported_tokens",
    "silent_tokens",
    "saved_seconds",
    "round_robin_of",
    "round_robin_tokens",
)


def _merge(ours: dict[K, int], theirs: Mapping[K, int], sign: int) -> None:
    for key, count in theirs.items():
        ours[key] = ours.get(key, 0) + sign * count
        if not ours[key]:
            del ours[key]
