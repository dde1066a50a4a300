"""What an answer says about the limits of its caller. Pure."""

from __future__ import annotations

import math

from matrixinfer.access.quota import KINDS, NOTHING, Amounts, Verdict, limits_of
from matrixinfer.config.access import QuotaConfig
from matrixinfer.errors import LimitExceeded

_WORDS = {
    "requests": "requests",
    "input_tokens": "input tokens",
    "output_tokens": "output tokens",
    "uncached_tokens": "uncached input tokens",
}


def headers_of(quota: QuotaConfig, verdict: Verdict, amounts: Amounts) -> dict[str, str]:
    """The rate-limit headers of an answer, once `amounts` are taken as well: limit, rest and seconds until all is free.

    `tokens` is the limit of tokens of which least is left.
    """
    found: dict[str, str] = {}
    tightest: tuple[int, int] | None = None
    reset = f"{math.ceil(verdict.reset or quota.window_seconds)}s"
    for kind, limit, used, taken in zip(KINDS, limits_of(quota), verdict.used, amounts, strict=True):
        if limit is None:
            continue
        rest = max(0, limit - used - taken)
        found |= _headers(kind.replace("_", "-"), limit, rest, reset)
        if kind != "requests" and (tightest is None or rest < tightest[1]):
            tightest = limit, rest
    if tightest is not None:
        found |= _headers("tokens", *tightest, reset)
    return found


def _headers(name: str, limit: int, rest: int, reset: str) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(limit),
        f"x-ratelimit-remaining-{name}": str(rest),
        f"x-ratelimit-reset-{name}": reset,
    }


def exceeded(quota: QuotaConfig, verdict: Verdict, amounts: Amounts) -> LimitExceeded:
    """The error of a request that one of its caller's limits refuses."""
    kind = verdict.refused_by or ""
    headers = headers_of(quota, verdict, NOTHING)
    if kind == "concurrent_requests":
        message = f"This key may have {quota.concurrent_requests} requests at a time, and has as many."
    else:
        position = KINDS.index(kind)
        limit, words = limits_of(quota)[position], _WORDS[kind]
        message = (
            f"This key may use {limit} {words} per {quota.window_seconds:g} s, and has used {verdict.used[position]}"
        )
        message += f"; this request asks for {amounts[position]}." if kind != "requests" else "."
    if verdict.retry_after is None:
        headers["x-should-retry"] = "false"  # what official clients look at
    else:
        headers["retry-after"] = str(max(1, math.ceil(verdict.retry_after)))
    return LimitExceeded(message, kind="requests" if "requests" in kind else "tokens", headers=headers)
