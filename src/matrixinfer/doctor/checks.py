"""Facts to findings: every check by its name, in the order in which it is told.

A check is a pure function that yields verdicts. What is new to be looked at, such as an index behind a network, is a fact
more in `FleetFacts` and a function more in `FLEET_CHECKS`.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

from matrixinfer.doctor import engine_checks, event_checks, redis_checks
from matrixinfer.doctor.facts import FleetFacts, PodFacts
from matrixinfer.doctor.findings import Finding, Verdict, blind, ok, warning

PodCheck: TypeAlias = Callable[[PodFacts], Iterator[Verdict]]
FleetCheck: TypeAlias = Callable[[FleetFacts], Iterator[Verdict]]


def diagnose(fleet: FleetFacts) -> list[Finding]:
    """Every finding: pod by pod, then those of the fleet."""
    found = [finding for pod in fleet.pods for finding in _pod(pod, fleet)]
    return found + [_finding(None, name, verdict) for name, check in FLEET_CHECKS.items() for verdict in check(fleet)]


def _pod(pod: PodFacts, fleet: FleetFacts) -> Iterator[Finding]:
    if pod.down is not None:
        down = blind(f"it does not answer: {pod.down}", "start it, or mend its `url`; requests go elsewhere meanwhile")
        yield _finding(pod.name, "health", down)
        return
    yield _finding(pod.name, "health", ok("it answers"))
    for verdict in _model(pod, fleet):
        yield _finding(pod.name, "model", verdict)
    for name, check in POD_CHECKS.items():
        for verdict in check(pod):
            yield _finding(pod.name, name, verdict)


def _finding(pod: str | None, check: str, verdict: Verdict) -> Finding:
    return Finding(pod=pod, check=check, level=verdict.level, says=verdict.says, fix=verdict.fix)


def _model(pod: PodFacts, fleet: FleetFacts) -> Iterator[Verdict]:
    """Whether it serves what is configured."""
    configured = {name for model in fleet.models for name in (model.name, *model.aliases)}
    if pod.served is None:
        wants_key = pod.models_status in (401, 403)
        yield warning(
            f"it does not tell what it serves (HTTP {pod.models_status or 'error'} from /v1/models)"
            + (": it wants an API key, and only clients' requests bring one" if wants_key else ""),
            "configure its model under `models`; its adapters stay unknown",
        )
    elif configured and not pod.served.aliases & configured:
        near = difflib.get_close_matches(pod.served.base_model, sorted(configured), n=1)
        yield warning(
            f"it serves {pod.served.base_model}, which is not configured",
            f"add `{pod.served.base_model}` to `models`"
            + (f", or name it so instead of `{near[0]}`" if near else "")
            + "; until then its own /tokenize is asked for every prompt",
        )
    else:
        yield ok(f"it serves {pod.served.base_model}")


POD_CHECKS: Mapping[str, PodCheck] = MappingProxyType(
    {
        "engine": engine_checks.engine,
        "caching": engine_checks.caching,
        "events": event_checks.events,
        "ports": event_checks.ports,
        "connection": event_checks.connection,
        "topic": event_checks.topic,
        "replay": event_checks.replay,
        "probe": event_checks.probe,
        "usage": engine_checks.usage,
        "blocks": engine_checks.blocks,
        "tokens": engine_checks.tokens,
        "clock": engine_checks.clock,
    }
)


def _models(fleet: FleetFacts) -> Iterator[Verdict]:
    """Whether somebody serves each configured model."""
    up = [pod for pod in fleet.pods if pod.down is None]
    served = {name for pod in up if pod.served is not None for name in (*pod.served.aliases, *pod.served.adapters)}
    if any(pod.served is None for pod in fleet.pods):
        return  # it may be one of those that have not told
    for model in fleet.models:
        if not served.intersection((model.name, *model.aliases)):
            yield blind(
                f"no pod serves the configured model {model.name}",
                f"name it as the engine does: {' or '.join(sorted(served))}",
            )


def _sizes(fleet: FleetFacts) -> Iterator[Verdict]:
    """Whether pods of one model have blocks of one size."""
    sizes: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for pod in fleet.pods:
        if pod.served is not None and pod.engine_block is not None:
            sizes[pod.served.base_model][pod.engine_block].append(pod.name)
    for model, pods in sizes.items():
        if len(pods) > 1:
            shown = "; ".join(f"{size} tokens on {', '.join(names)}" for size, names in sorted(pods.items()))
            yield warning(
                f"pods of {model} have blocks of different sizes ({shown}), so that equal prompts count differently",
                "start all of them with the same --block-size",
            )


def _publishers(fleet: FleetFacts) -> Iterator[Verdict]:
    """Whether one publisher is taken for several pods'."""
    pods: dict[str, dict[str, None]] = defaultdict(dict)
    for pod in fleet.pods:
        for feed in pod.feeds:
            pods[feed.source.endpoint][pod.name] = None
    for endpoint, names in pods.items():
        if len(names) > 1:
            yield blind(
                f"{endpoint} is followed as the events of {' and '.join(names)}: one engine's cache is taken for both",
                "give each pod its own kvEvents.endpoint",
            )


def _redis(fleet: FleetFacts) -> Iterator[Verdict]:
    if fleet.redis is not None:
        yield from redis_checks.server(fleet.redis)


def _scheme(fleet: FleetFacts) -> Iterator[Verdict]:
    if fleet.redis is not None:
        yield from redis_checks.scheme(fleet.redis)


def _writers(fleet: FleetFacts) -> Iterator[Verdict]:
    if fleet.redis is not None:
        yield from redis_checks.writers(fleet.redis, fleet.endpoints)


FLEET_CHECKS: Mapping[str, FleetCheck] = MappingProxyType(
    {
        "models": _models,
        "block sizes": _sizes,
        "publishers": _publishers,
        "redis": _redis,
        "scheme": _scheme,
        "writers": _writers,
    }
)
CHECKS = ("health", "model", *POD_CHECKS, *FLEET_CHECKS)
"""The names of all checks."""
