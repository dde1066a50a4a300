"""The ladder as data: of all prompt tokens, what each rung keeps, and what is lost on the way to it and why.

    prompt ─ new ─> ideal ─ evicted ─> capacity ─ dropped ─> perfect ─ routed elsewhere ─> predicted ─ mispredicted ─> reported

`of` makes it from a `Tally`; the words are in `words`. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from matrixinfer.traffic.ladder.tally import LOST, Tally, lost
from matrixinfer.traffic.ladder.words import CAUSES, Cause, Facts, remedy_of

RungName: TypeAlias = Literal["ideal", "capacity", "perfect", "predicted", "reported"]
_NEGLIGIBLE = 0.01
"""The rung `capacity` is known if the size of the caches was for all but this share of the tokens, or for most that were lost."""
_SURE = 1.96
"""Standard errors within which an estimate lies 95 times of 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Prompt tokens that one cause took between a rung and the one above it."""

    name: str
    tokens: int
    share: float
    """Of all prompt tokens; for the rung `reported` of `Rung.of_tokens`."""
    is_estimate: bool
    cause: str
    """What happened, in words."""
    remedy: str | None
    """What would help, in words; None if nothing needs to be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """What is left of the prompt tokens."""

    name: RungName
    tokens: int | None
    """None if it is unknown."""
    share: float | None
    """Of `of_tokens`."""
    of_tokens: int
    """The prompt tokens that it was counted over: all, or for `reported` those of the requests whose answers report it."""
    is_estimate: bool
    meaning: str
    cause: str | None
    """The largest loss on the way to it, in words; None if nothing was lost."""
    remedy: str | None
    losses: Sequence[Loss]
    """What was lost on the way to it, the largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Why prompt tokens were not found in a cache."""

    requests: int
    prompt_tokens: int
    reported_requests: int
    """Requests whose answers reported cached tokens, so that they can be compared with the predicted hit."""
    capacity_tokens: int | None
    """Tokens that the caches of the last request's pods hold together; None if that is unknown."""
    pods: int
    """Caches that the last request could go to."""
    sampled_share: float
    """Share of the blocks that the estimates rest on."""
    error_share: float | None
    """An estimated share is wrong by at most about this, 95 times of 100; 0 if all blocks were looked at, None if none."""
    rungs: Sequence[Rung]


_MEANINGS: dict[RungName, str] = {
    "ideal": "seen before by anyone",
    "capacity": "one cache as large as all pods' together would have kept",
    "perfect": "the pod that held most of each prompt held",
    "predicted": "the chosen pod was predicted to hold",
    "reported": "the engines say that they reused",
}


def of(tally: Tally) -> Ladder:
    """The ladder of what was counted."""
    losses = lost(tally)
    prompt = round(tally["prompt"])
    facts = Facts(tally.capacity, tally.pods, tally.excess, tally.rate < 1.0)
    by_rung = {
        rung: _losses([each for each in CAUSES if each.rung == rung], losses, prompt, facts)
        for rung in get_args(RungName)
        if rung != "reported"
    }
    rungs, left = [], tally["prompt"]
    for name, found in by_rung.items():
        left -= sum(losses.get(loss.name, 0.0) for loss in found)
        unknown = losses.get("capacity_unknown", 0.0)
        is_known = name != "capacity" or unknown <= max(losses.get("evicted", 0.0), _NEGLIGIBLE * prompt)
        is_estimate = tally.rate < 1.0 or name == "capacity"
        rungs.append(_rung(name, left if is_known else None, prompt, found, is_estimate and name in _SAMPLED))
    rungs.append(_reported(tally, facts))
    return Ladder(
        requests=round(tally["requests"]),
        prompt_tokens=prompt,
        reported_requests=round(tally["reported_requests"]),
        capacity_tokens=tally.capacity,
        pods=tally.pods,
        sampled_share=round(tally.rate, 6),
        error_share=_error(tally, losses),
        rungs=rungs,
    )


def flat(tally: Tally) -> dict[str, float]:
    """Tokens by `prompt` and by rung, `reported_prompt` and `reported_predicted`, and after `lost:` by cause.

    The latter two are of the requests that are in `reported`. Where it is unknown what the caches could keep, `capacity` is
    the most that it may be.
    """
    losses, left = lost(tally), tally["prompt"]
    shown = {"prompt": left}
    for rung in get_args(RungName):
        names = {each.name for each in CAUSES if each.rung == rung}
        left -= sum(tokens for name, tokens in losses.items() if name.partition(":")[0] in names)
        shown[rung] = max(0.0, left)
    shown |= {name: tally[name] for name in ("reported", "reported_prompt", "reported_predicted")}
    losses["fewer"] = tally["reported_fewer"]
    return shown | {LOST + name: tokens for name, tokens in losses.items()}


_SAMPLED = ("ideal", "capacity")


def _rung(name: RungName, tokens: float | None, of_tokens: int, losses: Sequence[Loss], is_estimate: bool) -> Rung:
    first = losses[0] if losses else None
    known = None if tokens is None else max(0, round(tokens))
    return Rung(
        name=name,
        tokens=known,
        share=None if known is None or not of_tokens else round(known / of_tokens, 4),
        of_tokens=of_tokens,
        is_estimate=is_estimate,
        meaning=_MEANINGS[name],
        cause=None if first is None else first.cause,
        remedy=None if first is None else first.remedy,
        losses=losses,
    )


def _losses(causes: Sequence[Cause], losses: dict[str, float], prompt: int, facts: Facts) -> list[Loss]:
    found = []
    for cause in causes:
        for name, tokens in losses.items():
            if name.partition(":")[0] == cause.name and round(tokens) > 0:
                found.append(_loss(cause, name, tokens, prompt, facts))
    return sorted(found, key=lambda each: -each.tokens)


def _loss(cause: Cause, name: str, tokens: float, of_tokens: int, facts: Facts) -> Loss:
    detail = name.partition(":")[2]
    return Loss(
        name=name,
        tokens=round(tokens),
        share=round(tokens / of_tokens, 4) if of_tokens else 0.0,
        is_estimate=cause.is_sampled and (facts.is_sampled or cause.rung != "ideal"),
        cause=cause.words.format(detail),
        remedy=remedy_of(cause, tokens, facts),
    )


def _reported(tally: Tally, facts: Facts) -> Rung:
    of_tokens = round(tally["reported_prompt"])
    values = {"fewer": tally["reported_fewer"], "more": tally["reported_more"]}
    causes = [each for each in CAUSES if each.rung == "reported"]
    losses = _losses(causes, values, of_tokens, facts)
    tokens = tally["reported"] if of_tokens else None
    first = next((loss for loss in losses if loss.name == "fewer"), None)
    return _rung("reported", tokens, of_tokens, [] if first is None else [first], is_estimate=False)


def _error(tally: Tally, losses: dict[str, float]) -> float | None:
    """By how much shares that rest on sampled blocks may be wrong, 95 times of 100; None if nothing was sampled.

    Requests use some blocks often, so that the different blocks count, and twice the error of even use is stated.
    """
    beyond, prompt, blocks = tally["beyond"], tally["prompt"], min(tally["sampled_blocks"], tally.different)
    if tally.rate >= 1.0 or not beyond or not prompt:
        return 0.0
    if not blocks:
        return None
    shares = [min(1.0, losses.get(each.name, 0.0) / beyond) for each in CAUSES if each.is_sampled]
    spread = max(share * (1.0 - share) for share in shares) * (1.0 - tally.rate)
    return round(2.0 * _SURE * math.sqrt((spread + 1.0 / blocks) / blocks) * beyond / prompt, 4)
