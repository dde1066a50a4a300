"""How many connections this process can have: each takes a file descriptor."""

from __future__ import annotations

import resource

_RESERVE = 64
"""For files, the listeners, events, Redis, and connections to the admin listener."""


def raise_limit() -> None:
    """Raise this process's limit as far as the system allows it without further rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def for_clients() -> int | None:
    """How many clients may be connected, if each may have a request at an engine; None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    return max(1, (soft - _RESERVE) // 3)
