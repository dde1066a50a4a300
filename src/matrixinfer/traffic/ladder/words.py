"""The causes of losses, in words: what happened, and what would help. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from matrixinfer.traffic.ladder.tally import excess_tokens

_WORTH = 0.8
"""A remedy names the room that would keep this share of what was evicted."""


class Facts(NamedTuple):
    """What remedies are made of."""

    capacity: int | None
    """Tokens that all caches hold together."""
    pods: int
    excess: Mapping[int, float]
    """As `Tally.excess`."""
    is_sampled: bool
    """Whether some blocks were left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why tokens were lost on the way to a rung. A `{}` in `words` stands for the detail behind a colon in a loss's name."""

    name: str
    rung: str
    words: str
    remedy: str | Callable[[float, Facts], str] | None = None
    is_sampled: bool = False


def _more_room(_: float, facts: Facts) -> str:
    """How many more KV tokens would have kept most of what was evicted."""
    whole, covered, step = sum(facts.excess.values()), 0.0, 0
    for step in sorted(facts.excess):
        covered += facts.excess[step]
        if covered >= _WORTH * whole:
            break
    room = excess_tokens(step)
    pods = ""
    if facts.capacity and facts.pods:
        count = math.ceil(room * facts.pods / facts.capacity)
        pods = f" ({count} more {'pod' if count == 1 else 'pods'} like these)"
    kept = covered / whole if whole else 0.0
    return f"about {_round(room):,} more KV tokens{pods}, or off-load to CPU memory, would have kept {kept:.0%} of them"


CAUSES = (
    Cause(
        name="new",
        rung="ideal",
        words="content that no earlier prompt had, nor a reply that is known",
        remedy=None,
        is_sampled=True,
    ),
    Cause(
        name="unsampled",
        rung="ideal",
        words="it is unknown whether they were seen before: too few blocks were sampled, more than 16 models are served, or "
        "blocks are hashed by the scheme `block`",
        remedy="look at a longer time with --since",
    ),
    Cause(
        name="ends",
        rung="ideal",
        words="ends of prompts: engines reuse whole blocks only, and never the last token",
    ),
    Cause(
        name="ids_unknown",
        rung="ideal",
        words="prompts, or parts of them, whose token ids were not known when a pod was chosen",
        remedy="see `matrixinfer explain ID` for why, and docs/troubleshooting.md",
    ),
    Cause(
        name="not_looked_up",
        rung="ideal",
        words="tokens beyond scheduler.maxPrefixTokens, which are not looked up",
        remedy="raise scheduler.maxPrefixTokens",
    ),
    Cause(
        name="caches_bypassed",
        rung="ideal",
        words="requests that ask their engine not to read its cache",
    ),
    Cause(
        name="evicted",
        rung="capacity",
        words="evicted: the fleet's caches are too small to keep them until they were needed again",
        remedy=_more_room,
        is_sampled=True,
    ),
    Cause(
        name="emptied",
        rung="perfect",
        words="the pod that had them restarted, was reset or has gone since, or its events had to be read again",
        remedy="restart pods one by one, and away from peaks; see pod restarts and matrixinfer_kv_frames_total",
        is_sampled=True,
    ),
    Cause(
        name="feed",
        rung="perfect",
        words="the events of the pod that computed them do not say, or not completely, what it holds",
        remedy="run `matrixinfer doctor`: exact events would show what is there",
        is_sampled=True,
    ),
    Cause(
        name="index",
        rung="perfect",
        words="the index did not answer, or was not believed because token ids have differed, when a pod was chosen",
        remedy="see matrixinfer_degraded_total for the reason",
        is_sampled=True,
    ),
    Cause(
        name="dropped",
        rung="perfect",
        words="the pod that had them evicted them, while one cache as large as all together would have kept them",
        remedy="the work, or copies of the same prefixes, are unevenly spread over the caches; a profile that places by cache "
        "footprint helps, such as the default",
        is_sampled=True,
    ),
    Cause(
        name="kind",
        rung="perfect",
        words="engines of this kind (sliding windows, Mamba) reuse a prompt only up to certain ends of earlier ones",
        is_sampled=True,
    ),
    Cause(
        name="reuses_less",
        rung="perfect",
        words="the pod holds them, but its answers have lately reported less than its events promise",
        remedy="run `matrixinfer doctor`, and see matrixinfer_kv_reuse",
    ),
    Cause(
        name="capacity_unknown",
        rung="perfect",
        words="no pod had them, and it is unknown whether the caches could have kept them",
        remedy="the size of the caches is unknown: follow every pod's KV events and metrics (`matrixinfer doctor`)",
        is_sampled=True,
    ),
    Cause(
        name="busier",
        rung="predicted",
        words="they were on another pod, which was busier than the chosen one",
        remedy="often right, as waiting costs more than computing; with more pods, or more copies of hot prefixes, it is rarer",
    ),
    Cause(
        name="overloaded",
        rung="predicted",
        words="they were on another pod, which the filter `{}` had removed because of its load",
        remedy="often right, as waiting costs more than computing; more pods, or a looser bound of the filter, make it rarer",
    ),
    Cause(
        name="filtered",
        rung="predicted",
        words="they were on another pod, which the filter `{}` had removed",
        remedy="see `matrixinfer explain ID` for its reason, and the filter's parameters",
    ),
    Cause(
        name="withheld",
        rung="predicted",
        words="they were on another pod, which was ejected or busy",
        remedy="see matrixinfer_ejections_total and the pod's errors",
    ),
    Cause(
        name="scored",
        rung="predicted",
        words="they were on another pod, which was not busier, but which the scheduler's profile rated lower",
        remedy="a profile that weighs the cache more helps: the default does, round robin and random do not look at it",
    ),
    Cause(
        name="unheard",
        rung="predicted",
        words="a pod held them, but its events had not come to the gateway yet, or were lost",
        remedy="see that events come quickly and that engines offer a replay endpoint; gateways that share a Redis also hear "
        "of each other's requests",
    ),
    Cause(
        name="fewer",
        rung="reported",
        words="engines reused less than predicted",
        remedy="run `matrixinfer doctor`, and see matrixinfer_drift_total; blocks may also be evicted while a request waits, "
        "or within the scheduler.pendingSeconds for which they count as cached in any case",
    ),
)


def remedy_of(cause: Cause, tokens: float, facts: Facts) -> str | None:
    """What would help against a loss."""
    return cause.remedy(tokens, facts) if callable(cause.remedy) else cause.remedy


def _round(value: float) -> int:
    """Two digits are as many as an estimate has."""
    digits = max(0, len(str(int(value))) - 2)
    return int(round(value, -digits))
