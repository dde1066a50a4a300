"""The policies that a replay compares, by name: baselines, our profiles, models of the rules of others, and bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from matrixinfer.config import SchedulerConfig
from matrixinfer.errors import ConfigError
from matrixinfer.scheduler.policies import POLICIES as PROFILES
from matrixinfer.scheduler.policies import with_policy
from matrixinfer.study import baselines, bounds, rivals
from matrixinfer.study.gateway import Gateway
from matrixinfer.study.jobs import Router
from matrixinfer.study.replay import Replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How requests are routed."""

    name: str
    summary: str
    make: Callable[[Replay, int], Router]
    """Makes the router of a gateway."""
    source: str | None = None
    """Where the rule is published, for models of the rules of others."""
    publishes: bool = True
    """Whether engines publish KV events to it."""
    shares_cache: bool = False
    """All pods have one cache together."""


def _seed(replay: Replay, gateway: int) -> int:
    return replay.fleet.seed * 1000 + gateway


def _baseline(kind: type[baselines.Baseline]) -> Callable[[Replay, int], Router]:
    def make(replay: Replay, gateway: int) -> Router:
        fleet = replay.fleet
        return kind(seed=_seed(replay, gateway), block_size=replay.trace.block_size, pod_tokens=fleet.pod_tokens)

    return make


def _gateway(config: SchedulerConfig, pick: rivals.Pick | None = None) -> Callable[[Replay, int], Router]:
    def make(replay: Replay, gateway: int) -> Router:
        writer = replay.writer
        return Gateway(
            name=f"gateway-{gateway}",
            config=config,
            blocks=replay.blocks,
            block_size=replay.trace.block_size,
            clock=replay.clock,
            seed=_seed(replay, gateway),
            pick=pick,
            reads=writer if isinstance(writer, Gateway) else None,
            ask=lambda pod, start: replay.asked(gateway, pod, start),
        )

    return make


def profile(name: str, config: SchedulerConfig) -> Policy:
    """A policy that decides by the scheduler with `config`."""
    return Policy(name=name, summary="", make=_gateway(config))


def _all() -> dict[str, Policy]:
    first = {
        "random": baselines.Random,
        "round_robin": baselines.RoundRobin,
        "least_request": baselines.LeastRequest,
        "power_of_two": baselines.PowerOfTwo,
        "session_hash": baselines.SessionHash,
        "session_sticky": baselines.SessionSticky,
        "prefix_hash": baselines.PrefixHash,
        "approx_prefix": baselines.ApproxPrefix,
        "longest_match": baselines.LongestMatch,
    }
    found = [
        Policy(name=name, summary=_summary(kind), make=_baseline(kind), publishes=False) for name, kind in first.items()
    ]
    found += [
        Policy(
            name=name,
            summary=f"the profile `{name}` of this gateway",
            make=_gateway(with_policy(SchedulerConfig(), name)),
        )
        for name in PROFILES
        if name not in first
    ]
    found += [
        Policy(
            name=rule.name,
            summary=rule.summary,
            source=rule.source,
            make=_gateway(SchedulerConfig(), rule.pick) if rule.pick else _baseline(rule.baseline),
            publishes=rule.pick is not None,
        )
        for rule in rivals.RULES
    ]
    found += [
        Policy(
            name="pooled",
            summary="a bound for hits: one cache of all pods, and the least prompt tokens to compute",
            make=bounds.LeastWork,
            publishes=False,
            shares_cache=True,
        ),
        Policy(
            name="clairvoyant",
            summary="knows each engine's cache and queue and the requests to come; decides one by one",
            make=bounds.EarliestToken,
            publishes=False,
        ),
    ]
    return {policy.name: policy for policy in found}


def _summary(kind: type) -> str:
    text = (kind.__doc__ or "").strip().rstrip(".")
    return text[:1].lower() + text[1:]


POLICIES: Mapping[str, Policy] = MappingProxyType(_all())
"""All of them, by name."""


def chosen(names: str) -> list[Policy]:
    """The policies of a list with commas. Raises `ConfigError` for a name that there is not."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in POLICIES:
            raise ConfigError("--policies", f"unknown policy `{name}`; there are: {', '.join(POLICIES)}")
    return [POLICIES[name] for name in dict.fromkeys(wanted)]
