"""Whether two readings of an engine's metrics come from the same run of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class BootMarks:
    """What stays the same, or only grows, while an engine runs. Absent marks decide nothing."""

    constants: Mapping[str, bytes] = field(default_factory=dict)
    """By name: the start time of the process, the cache's configuration, the names of the model."""
    counters: Mapping[str, float] = field(default_factory=dict)


def is_another_run(before: BootMarks, now: BootMarks) -> bool:
    """Whether the engine must have restarted, or been replaced by another one, between two readings."""
    changed = any(now.constants.get(name, value) != value for name, value in before.constants.items())
    return changed or any(now.counters.get(name, value) < value for name, value in before.counters.items())
