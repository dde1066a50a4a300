"""The load that SGLang publishes with `--load-publish-endpoint`. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from matrixinfer.errors import UNREADABLE

MAX_BYTES = 64 * 1024
"""Longer messages are refused. A report has less than 100 bytes."""
FRESH_SECONDS = 3.0
"""An engine repeats an unchanged report every second. An older one counts no more, and `/metrics` is used."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _LoadStat(msgspec.Struct, array_like=True, tag="LoadStat", gc=False):
    """The published array. Later releases append fields, which are left unread."""

    running: _Count
    waiting: _Count
    tokens: _Count
    capacity: _Count
    rank: int | None = None
    uncached_tokens: _Count = 0
    total_tokens: _Count = 0
    max_running: _Count = 0
    prefill_tokens: _Count = 0
    prefill_busy_us: _Count = 0


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The load of one endpoint, as its engine published it."""

    running: int
    waiting: int
    cache_usage: float | None
    """Fraction of KV blocks in use, 0 to 1; None if the engine does not say its capacity."""
    uncached_tokens: int
    """Prompt tokens of waiting requests that are not in the cache."""
    prefill_busy_seconds: float
    """Time spent computing prompts since the engine started."""
    rank: int | None
    """The rank that the engine itself says it is from."""
    read_at: float
    """When it came, in seconds on the registry's clock."""


def parse_load(payload: bytes, *, read_at: float) -> LoadReport | None:
    """The report in a message; None if it cannot be read."""
    if len(payload) > MAX_BYTES:
        return None
    try:
        stat = msgspec.msgpack.decode(payload, type=_LoadStat)
    except UNREADABLE:
        return None
    return LoadReport(
        running=stat.running,
        waiting=stat.waiting,
        cache_usage=min(1.0, stat.tokens / stat.capacity) if stat.capacity else None,
        uncached_tokens=stat.uncached_tokens,
        prefill_busy_seconds=stat.prefill_busy_us / 1e6,
        rank=stat.rank,
        read_at=read_at,
    )
