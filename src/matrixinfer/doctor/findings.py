"""The findings that the doctor reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "blind"]
"""`blind`: the gateway routes without knowledge of the pod's cache, or with wrong knowledge."""
EXIT_CODES: dict[Level, int] = {"ok": 0, "warning": 1, "blind": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of one check: a sentence, and how to fix the problem if there is one."""

    level: Level
    message: str
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A verdict with the check that gave it, and the pod. `pod` is None for a finding about the whole fleet."""

    pod: str | None
    check: str
    level: Level
    message: str
    fix: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How many pods were checked, how many findings each level has, and the exit code that follows."""

    pods: int
    ok: int
    warning: int
    blind: int
    exit_code: int


def ok(message: str) -> Verdict:
    """No problem."""
    return Verdict(level="ok", message=message)


def warning(message: str, fix: str) -> Verdict:
    """Routing works, with a limitation."""
    return Verdict(level="warning", message=message, fix=fix)


def blind(message: str, fix: str) -> Verdict:
    """The gateway cannot know the pod's cache, or knows it wrongly."""
    return Verdict(level="blind", message=message, fix=fix)


def summarize(findings: Sequence[Finding], pods: int) -> Summary:
    """Count the findings. The worst one decides the exit code."""
    counts = Counter(finding.level for finding in findings)
    worst = max((EXIT_CODES[level] for level in counts), default=0)
    return Summary(pods=pods, ok=counts["ok"], warning=counts["warning"], blind=counts["blind"], exit_code=worst)
