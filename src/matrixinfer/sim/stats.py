"""What an engine counts, named as vLLM's metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges and totals of one rank, or of several."""

    running: int
    waiting: int
    cache_usage: float
    """Share of blocks that requests hold, 0 to 1; 0 when idle. Of several ranks the highest."""
    prefix_queries: int
    prefix_hits: int
    """Prompt tokens looked up and found, over all requests."""
    loaded_tokens: int
    """Prompt tokens found in the CPU tier besides those."""
    prompt_tokens: int
    generated_tokens: int
    preemptions: int

    @classmethod
    def over(cls, ranks: Iterable[EngineStats]) -> EngineStats:
        """Of at least one rank, all together."""
        each = list(ranks)
        counts = {field.name: sum(getattr(stats, field.name) for stats in each) for field in fields(cls)}
        return cls(**counts | {"cache_usage": max(stats.cache_usage for stats in each)})
