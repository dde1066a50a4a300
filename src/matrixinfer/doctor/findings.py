"""What the doctor says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "blind"]
"""`blind`: requests to the pod are routed without, or by wrong, knowledge of its cache."""
EXIT_CODES: dict[Level, int] = {"ok": 0, "warning": 1, "blind": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one check found: a sentence, and what mends it unless all is well."""

    level: Level
    says: str
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A verdict with its place. `pod` is None for what concerns the whole fleet."""

    pod: str | None
    check: str
    level: Level
    says: str
    fix: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How many findings there are of each level, of how many pods, and what that means as an exit code."""

    pods: int
    ok: int
    warning: int
    blind: int
    exit_code: int


def ok(says: str) -> Verdict:
    """All is well."""
    return Verdict(level="ok", says=says)


def warning(says: str, fix: str) -> Verdict:
    """Routing works, but for something."""
    return Verdict(level="warning", says=says, fix=fix)


def blind(says: str, fix: str) -> Verdict:
    """Routing does not see the cache, or sees it wrong."""
    return Verdict(level="blind", says=says, fix=fix)


def sum_up(findings: Sequence[Finding], pods: int) -> Summary:
    """The worst finding decides the exit code."""
    counts = Counter(finding.level for finding in findings)
    worst = max((EXIT_CODES[level] for level in counts), default=0)
    return Summary(pods=pods, ok=counts["ok"], warning=counts["warning"], blind=counts["blind"], exit_code=worst)
