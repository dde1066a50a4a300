"""What a caller has used within its window, and whether more is allowed. Pure: times are handed in.

A window is cut into slices. What counts is the slice of now and the whole ones before it that a window covers, so that no
window of that length, wherever it begins, has more than its limit.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from matrixinfer.config.access import QuotaConfig

SLICES = 12
MAX_ACCOUNTS = 100_000
"""Accounts that have nothing running are forgotten beyond it, the least recently used first."""


class Amounts(NamedTuple):
    """What a request uses."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    uncached_tokens: int = 0

    def minus(self, other: Amounts) -> Amounts:
        """The difference, kind by kind."""
        return Amounts(*(a - b for a, b in zip(self, other, strict=True)))


KINDS = Amounts._fields
NOTHING = Amounts()


class Verdict(NamedTuple):
    """Whether a request is within its limits, and how much had been used before it."""

    refused_by: str | None
    """The limit that it exceeds: one of `KINDS`, or `concurrent_requests`."""
    used: Amounts
    running: int
    retry_after: float | None = None
    """Seconds after which there may be room; None if there never will be, because the request alone exceeds the limit."""
    reset: float = 0.0
    """Seconds after which everything used so far no longer counts."""


def limits_of(quota: QuotaConfig) -> tuple[int | None, ...]:
    """The limits of a quota, in the order of `KINDS`."""
    return quota.requests, quota.input_tokens, quota.output_tokens, quota.uncached_tokens


def is_limited(quota: QuotaConfig) -> bool:
    """Whether a quota limits anything."""
    return quota.concurrent_requests is not None or any(limit is not None for limit in limits_of(quota))


def slice_at(quota: QuotaConfig, now: float) -> int:
    """The number of the slice that `now` is in."""
    return math.floor(now * SLICES / quota.window_seconds)


@dataclass(slots=True)
class _Account:
    slices: dict[int, Amounts] = field(default_factory=dict)
    running: int = 0

    def drop_before(self, first: int) -> None:
        for number in [number for number in self.slices if number < first]:
            del self.slices[number]


class Ledger:
    """The accounts of all callers in this process."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def reserve(self, name: str, quota: QuotaConfig, amounts: Amounts, now: float) -> Verdict:
        """Take the amounts of a request that begins now, if all of them are within the limits; else nothing."""
        account = self._account(name)
        current = slice_at(quota, now)
        account.drop_before(current - SLICES)
        verdict = judge(account.slices, account.running, quota, amounts, now)
        if verdict.refused_by is None:
            account.running += 1
            _add(account.slices, current, amounts)
        return verdict

    def settle(self, name: str, number: int, change: Amounts) -> None:
        """A request that began in slice `number` has ended, and used `change` more than was taken (less if negative)."""
        account = self._accounts.get(name)
        if account is None:
            return
        account.running = max(0, account.running - 1)
        if number in account.slices:  # else it has left the window
            _add(account.slices, number, change)

    def _account(self, name: str) -> _Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = _Account()
            while len(self._accounts) > MAX_ACCOUNTS and (idle := self._idle()) is not None:
                del self._accounts[idle]
        self._accounts.move_to_end(name)
        return account

    def _idle(self) -> str | None:
        """The least recently used account with nothing running, among the oldest ones."""
        for name, _ in zip(self._accounts, range(16), strict=False):
            if not self._accounts[name].running:
                return name
        return None


def judge(slices: dict[int, Amounts], running: int, quota: QuotaConfig, amounts: Amounts, now: float) -> Verdict:
    """Whether `amounts` fit into what is left of a quota, when these slices were used."""
    used = Amounts(*map(sum, zip(NOTHING, *slices.values(), strict=True)))
    length, current = quota.window_seconds / SLICES, slice_at(quota, now)
    newest = max(slices, default=current - SLICES - 1)
    reset = max(0.0, (newest + SLICES + 1) * length - now)
    if quota.concurrent_requests is not None and running >= quota.concurrent_requests:
        return Verdict("concurrent_requests", used, running, retry_after=1.0, reset=reset)
    for position, (kind, limit) in enumerate(zip(KINDS, limits_of(quota), strict=True)):
        if limit is None or used[position] + amounts[position] <= limit:
            continue
        if amounts[position] > limit:
            return Verdict(kind, used, running, reset=reset)
        excess = used[position] + amounts[position] - limit
        for number in sorted(slices):
            excess -= slices[number][position]
            if excess <= 0:
                after = (number + SLICES + 1) * length - now
                return Verdict(kind, used, running, retry_after=max(0.0, after), reset=reset)
    return Verdict(None, used, running, reset=reset)


def _add(slices: dict[int, Amounts], number: int, amounts: Amounts) -> None:
    before = slices.get(number, NOTHING)
    slices[number] = Amounts(*(max(0, a + b) for a, b in zip(before, amounts, strict=True)))
