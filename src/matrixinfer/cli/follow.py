"""`matrixinfer explain --follow`: prints decisions as their answers end."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from matrixinfer.cli import json_lines
from matrixinfer.cli.terminal import plain

EVERY_SECONDS = 1.0
LIMIT = 200
"""Decisions that are asked for each time. If more come between two times, it says so."""
_COLUMNS = (
    ("at", 8),
    ("id", 32),
    ("pod", 24),
    ("tokens", 8),
    ("predicted_hit_tokens", 20),
    ("cached_tokens", 13),
    ("ttft_ms", 9),
    ("status", 6),
)
_NUMBERS = frozenset({"tokens", "predicted_hit_tokens", "cached_tokens", "ttft_ms", "status"})

Json = Mapping[str, Any]


class Follower:
    """Picks from the last decisions those that have ended since it was last given some; at first, at most `first`."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._printed: set[tuple[float, str]] = set()
        self._order: deque[tuple[float, str]] = deque()
        self._newest = float("-inf")
        self._is_first = True

    def take(self, decisions: Sequence[Json]) -> tuple[list[Json], bool]:
        """`decisions` are the last ones, newest first. Returns those to print, oldest first, and whether some were missed."""
        missed = not self._is_first and len(decisions) >= LIMIT and decisions[-1]["at"] > self._newest
        ended = [each for each in reversed(decisions) if each.get("is_over", True) and _key(each) not in self._printed]
        for each in ended:
            self._printed.add(_key(each))
            self._order.append(_key(each))
        while len(self._order) > 2 * LIMIT:
            self._printed.discard(self._order.popleft())
        if decisions:
            self._newest = max(self._newest, decisions[0]["at"])
        if self._is_first:
            ended, self._is_first = ended[-self._first :], False
        return ended, missed


async def follow(
    ask: Callable[[], Awaitable[Sequence[Json]]], *, first: int, as_json: bool, every: float = EVERY_SECONDS
) -> None:
    """Print decisions until this is cancelled. `ask` gives the last `LIMIT` ones, newest first, and may raise."""
    follower = Follower(first)
    if not as_json:
        _print(heading())
    while True:
        ended, missed = follower.take(await ask())
        if missed and not as_json:
            _print(f"(more than {LIMIT} decisions came between two looks; only the last ones are shown)")
        for each in ended:
            if as_json:
                json_lines.write(dict(each))
            else:
                _print(line(each))
        await asyncio.sleep(every)


def heading() -> str:
    """The names of the columns."""
    return "  ".join([*(_padded(name, name, width) for name, width in _COLUMNS), "reason"])


def line(decision: Json) -> str:
    """One decision in columns. What is too long for its column shifts the rest, and is never cut."""
    reported = decision["reported"]
    pod = reported["attempts"][-1]
    values = {
        "at": datetime.fromtimestamp(decision["at"]).astimezone().strftime("%H:%M:%S"),
        "id": decision["id"],
        "pod": pod,
        "tokens": decision["tokens"],
        "predicted_hit_tokens": decision["predicted_hit_tokens"] if pod == decision["chosen"] else None,
        "cached_tokens": reported["cached_tokens"],
        "ttft_ms": decision.get("ttft_ms"),
        "status": reported["status"],
    }
    cells = [_padded(name, "-" if values[name] is None else str(values[name]), width) for name, width in _COLUMNS]
    return plain("  ".join([*cells, decision.get("reason") or "-"]))


def _padded(name: str, text: str, width: int) -> str:
    return text.rjust(width) if name in _NUMBERS else text.ljust(width)


def _key(decision: Json) -> tuple[float, str]:
    return decision["at"], decision["id"]


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
