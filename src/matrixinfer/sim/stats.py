"""Counters of an engine, named like vLLM's metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges and totals of one rank, or of several together."""

    running: int
    waiting: int
    cache_usage: float
    """Share of blocks that running requests use, 0 to 1. For several ranks: the highest."""
    prefix_queries: int
    prefix_hits: int
    """Prompt tokens looked up, and found on the GPU, over all requests."""
    loaded_tokens: int
    """Prompt tokens found in the CPU tier, in addition to those."""
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    used_tokens: int
    """Room in the cache that running requests use, in tokens."""
    waiting_tokens: int
    """Tokens of the requests that wait."""
    computed_prompt_tokens: int
    """Prompt tokens that were not cached, computed so far."""
    prefill_seconds: float
    """Time of the steps that computed any."""

    @classmethod
    def total(cls, ranks: Iterable[EngineStats]) -> EngineStats:
        """The sum over at least one rank; `cache_usage` is the maximum."""
        each = list(ranks)
        counts = {field.name: sum(getattr(stats, field.name) for stats in each) for field in fields(cls)}
        return cls(**counts | {"cache_usage": max(stats.cache_usage for stats in each)})
