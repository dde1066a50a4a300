"""What the results of a replay mean, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from matrixinfer.scheduler.policies import POLICIES as PROFILES
from matrixinfer.traffic.ladder.rungs import Ladder

Results: TypeAlias = Mapping[str, float | int | None]
BOUNDS = ("pooled", "clairvoyant")
DEFAULT = "kv_aware"
_SAME = 0.02
"""Times that differ by less are the same, for one replay."""
_LARGE = 0.05
"""A share of the prompt tokens that is worth a remedy."""
_BASELINES = ("round_robin", "random", "least_request")
_OURS = [name for name in PROFILES if name not in _BASELINES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One finding. `remedy` is what would help; None where nothing needs to be done."""

    title: str
    text: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to do, and why."""

    headline: str
    summary: str
    points: Sequence[Point]


def seconds(value: float | None) -> str:
    """A time for people."""
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.3g} ms" if value < 0.1 else f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def percent(value: float | None) -> str:
    """A share for people."""
    return "–" if value is None else f"{value:.1%}"


def contenders(results: Mapping[str, Results]) -> list[str]:
    """The policies that are no bounds and have a result, fastest first."""
    known = [name for name, each in results.items() if name not in BOUNDS and each["ttft_mean_s"] is not None]
    return sorted(known, key=lambda name: _value(results[name], "ttft_mean_s"))


def advise(results: Mapping[str, Results], ladders: Mapping[str, Ladder]) -> Advice:
    """Read the results and the ladder of each policy."""
    ranked = contenders(results)
    if not ranked:
        return Advice(headline="No policy has a result", summary="No request got a first token.", points=())
    best = chosen(results)
    points = [*_hits(ladders[best], best), *_load(results, best)]
    return Advice(headline=_headline(ranked, best, results), summary=_summary(ranked, best, results), points=points)


def regret(results: Mapping[str, Results], name: str) -> float | None:
    """Mean time to first token of a policy, in multiples of the bound's; None without a bound."""
    bounds = [value for bound in BOUNDS if bound in results and (value := results[bound]["ttft_mean_s"])]
    value = results[name]["ttft_mean_s"]
    return None if not bounds or value is None else value / min(bounds)


def chosen(results: Mapping[str, Results]) -> str:
    """The profile to use: the default if none is faster, else the fastest of ours; without any of ours, the fastest."""
    ranked = contenders(results)
    ours = [name for name in ranked if name in _OURS]
    if not ours:
        return ranked[0]
    fastest = _value(results[ours[0]], "ttft_mean_s")
    if DEFAULT in ours and _value(results[DEFAULT], "ttft_mean_s") <= fastest * (1 + _SAME):
        return DEFAULT
    return ours[0]


def _headline(ranked: Sequence[str], name: str, results: Mapping[str, Results]) -> str:
    if name not in _OURS:
        return f"{name} is fastest; no profile of this gateway was replayed"
    time, best = _value(results[name], "ttft_mean_s"), _value(results[ranked[0]], "ttft_mean_s")
    verb = f"Keep the default profile, {name}" if name == DEFAULT else f"Use the profile {name}"
    if time > best * (1 + _LARGE):
        return f"{verb}, though {ranked[0]} is {1 - best / time:.0%} faster here"
    return verb


def _summary(ranked: Sequence[str], best: str, results: Mapping[str, Results]) -> str:
    time = _value(results[best], "ttft_mean_s")
    text = f"The first token comes after {seconds(time)} on average, for one request in ten after more than "
    text += f"{seconds(results[best]['ttft_p90_s'])}."
    base = next((name for name in _BASELINES if name in ranked and name != best), None)
    if base is not None:
        other = _value(results[base], "ttft_mean_s")
        change = f"{1 - time / other:.0%} less" if time < other else f"{time / other - 1:.0%} more"
        text += f" That is {change} than with {base} ({seconds(other)})."
    behind = regret(results, best)
    if behind is not None:
        left = max(0.0, 1 - 1 / behind)
        text += f" The better bound is {left:.0%} below: no rule can gain more than about that."
    if best in _OURS and time > _value(results[ranked[0]], "ttft_mean_s") * (1 + _LARGE):
        text += " `matrixinfer tune` looks for settings that fit this traffic better."
    if best in _OURS and best != DEFAULT:
        text += f" Set it with `matrixinfer serve --policy {best}`."
    return text


def _hits(ladder: Ladder, name: str) -> Iterator[Point]:
    rungs = {rung.name: rung for rung in ladder.rungs}
    shares: dict[str, float | None] = {rung.name: rung.share for rung in ladder.rungs}
    ideal, kept, hit = shares["ideal"], shares["capacity"], shares["reported"]
    if ideal is None or kept is None or hit is None:
        yield Point(title="Hits", text=f"Engines reuse {percent(hit)} of the prompt tokens.")
        return
    if ideal - kept > _LARGE:
        evicted = rungs["capacity"].remedy
        yield Point(
            title="The caches are too small",
            text=f"{percent(ideal - kept)} of the prompt tokens were seen before, but even one cache as large as all of these "
            "could not keep them. No routing policy can win them back.",
            remedy=_sentence(evicted) if evicted else "Add pods or cache per pod, or off-load to CPU memory.",
        )
    else:
        yield Point(
            title="The caches are large enough",
            text=f"Together they could keep {percent(kept)} of the prompt tokens, of {percent(ideal)} that were seen before.",
        )
    if kept - hit > _LARGE:
        lost = [loss for rung in ladder.rungs if rung.name not in ("ideal", "capacity") for loss in rung.losses]
        largest = max(lost, key=lambda loss: loss.share, default=None)
        text = f"With {name}, engines reuse {percent(hit)} of the prompt tokens, of {percent(kept)} that the fleet could keep."
        if largest is not None:
            text += f" The largest loss, {percent(largest.share)}: {largest.cause}."
        remedy = None if largest is None or largest.remedy is None else _sentence(largest.remedy)
        yield Point(
            title="Routing leaves hits behind", text=text, remedy=remedy or "Try `matrixinfer tune` on this trace."
        )
    else:
        yield Point(
            title="Routing finds what is there",
            text=f"With {name}, engines reuse {percent(hit)} of the prompt tokens, of {percent(kept)} that the fleet could keep.",
        )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _load(results: Mapping[str, Results], name: str) -> Iterator[Point]:
    found = results[name]
    requests = _value(found, "requests") or 1
    half, slowest = found["ttft_p50_s"], found["ttft_p99_s"]
    if _value(found, "preemptions") > requests * 0.01:
        yield Point(
            title="Engines run out of cache while they compute",
            text=f"{found['preemptions']} requests were interrupted and computed again.",
            remedy="Give each pod more cache, or let fewer sequences run at a time.",
        )
    if half and slowest and slowest > 20 * half:
        yield Point(
            title="Some requests wait in queues",
            text=f"One in a hundred waits more than {seconds(slowest)}, half of them less than {seconds(half)}.",
            remedy="Add pods, or limit how many requests come at once.",
        )
    if _value(found, "imbalance") > 1.5:
        yield Point(
            title="Work is uneven",
            text=f"The busiest pod computes {found['imbalance']:.2f} times as long as the mean.",
            remedy="See the load of each pod below: few long conversations cannot be spread evenly.",
        )
    lost = int(_value(found, "too_long") + _value(found, "broken_off"))
    if lost:
        yield Point(
            title="Requests without an answer",
            text=f"{lost} requests were too long for any cache, or were broken off by a fault.",
            remedy="Give each pod room for the longest request.",
        )


def _value(results: Results, key: str) -> float:
    value = results[key]
    return 0.0 if value is None else float(value)
