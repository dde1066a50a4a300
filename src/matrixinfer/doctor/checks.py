"""Turns facts into findings. Lists every check by name, in the order in which findings are reported.

A check is a pure function that yields verdicts. To check something new, add a fact to `PodFacts` or `FleetFacts`, and a
function to `POD_CHECKS` or `FLEET_CHECKS`.
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


def check_fleet(fleet: FleetFacts) -> list[Finding]:
    """All findings: pod by pod, then the ones about the fleet."""
    findings = [finding for pod in fleet.pods for finding in _check_pod(pod, fleet)]
    return findings + [
        _finding(None, name, verdict) for name, check in FLEET_CHECKS.items() for verdict in check(fleet)
    ]


def _check_pod(pod: PodFacts, fleet: FleetFacts) -> Iterator[Finding]:
    if pod.down is not None:
        down = blind(
            f"the engine does not answer: {pod.down}",
            "start it, or correct the pod's `url`; until then, requests go to other pods",
        )
        yield _finding(pod.name, "health", down)
        return
    yield _finding(pod.name, "health", ok("the engine answers"))
    for verdict in _model(pod, fleet):
        yield _finding(pod.name, "model", verdict)
    for name, check in POD_CHECKS.items():
        for verdict in check(pod):
            yield _finding(pod.name, name, verdict)


def _finding(pod: str | None, check: str, verdict: Verdict) -> Finding:
    return Finding(pod=pod, check=check, level=verdict.level, message=verdict.message, fix=verdict.fix)


def _model(pod: PodFacts, fleet: FleetFacts) -> Iterator[Verdict]:
    """Whether the pod serves a configured model."""
    configured = {name for model in fleet.models for name in (model.name, *model.aliases)}
    if pod.models_status in (401, 403):
        yield warning(
            f"the engine does not say which model it serves (HTTP {pod.models_status} from /v1/models): "
            + ("it refuses the API key that is configured" if pod.has_key else "it requires an API key"),
            "set `apiKeyFile` or `apiKeyEnv` of the pod to a key that the engine takes (`--api-key`)",
        )
    elif pod.served is None:
        yield warning(
            f"the engine does not say which model it serves (HTTP {pod.models_status or 'error'} from /v1/models)",
            "set `model` of the pod; its adapters remain unknown",
        )
    elif configured and not pod.served.aliases & configured:
        near = difflib.get_close_matches(pod.served.base_model, sorted(configured), n=1)
        yield warning(
            f"the engine serves {pod.served.base_model}, which is not configured",
            f"add `{pod.served.base_model}` to `models`"
            + (f", or rename `{near[0]}` to that" if near else "")
            + "; until then, the gateway asks the engine's /tokenize for every prompt",
        )
    else:
        yield ok(f"the engine serves {pod.served.base_model}")


POD_CHECKS: Mapping[str, PodCheck] = MappingProxyType(
    {
        "engine": engine_checks.engine,
        "sleep": engine_checks.sleep,
        "caching": engine_checks.caching,
        "events": event_checks.events,
        "ranks": event_checks.ranks,
        "ports": event_checks.ports,
        "connection": event_checks.connection,
        "topic": event_checks.topic,
        "limits": event_checks.limits,
        "replay": event_checks.replay,
        "probe": event_checks.probe,
        "usage": engine_checks.usage,
        "blocks": engine_checks.blocks,
        "tokens": engine_checks.tokens,
        "sent ids": engine_checks.sent_ids,
        "clock": engine_checks.clock,
    }
)


def _models(fleet: FleetFacts) -> Iterator[Verdict]:
    """Whether every configured model is served by a pod."""
    up = [pod for pod in fleet.pods if pod.down is None]
    served = {name for pod in up if pod.served is not None for name in (*pod.served.aliases, *pod.served.adapters)}
    if any(pod.served is None for pod in fleet.pods):
        return  # a pod that did not say may serve it
    for model in fleet.models:
        if not served.intersection((model.name, *model.aliases)):
            yield blind(
                f"no pod serves the configured model {model.name}",
                f"expected a name that an engine serves: {' or '.join(sorted(served))}",
            )


def _sizes(fleet: FleetFacts) -> Iterator[Verdict]:
    """Whether all pods of a model have the same block size."""
    sizes: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for pod in fleet.pods:
        if pod.served is not None and pod.engine_block is not None:
            sizes[pod.served.base_model][pod.engine_block].append(pod.name)
    for model, pods in sizes.items():
        if len(pods) > 1:
            shown = "; ".join(f"{size} tokens on {', '.join(names)}" for size, names in sorted(pods.items()))
            yield warning(
                f"the pods of {model} have different block sizes ({shown}): the same prompt matches differently on each",
                "start all of them with the same --block-size",
            )


def _publishers(fleet: FleetFacts) -> Iterator[Verdict]:
    """Whether one publisher is followed as several pods."""
    pods: dict[str, dict[str, None]] = defaultdict(dict)
    for pod in fleet.pods:
        for feed in pod.feeds:
            pods[feed.source.endpoint][pod.name] = None
    for endpoint, names in pods.items():
        if len(names) > 1:
            yield blind(
                f"{endpoint} is configured as the events of {' and '.join(names)}: one engine's cache is taken for theirs",
                "set kvEvents.endpoint of each pod to its own publisher",
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


def _foreign(fleet: FleetFacts) -> Iterator[Verdict]:
    if fleet.redis is not None and fleet.redis.foreign is not None:
        yield from redis_checks.foreign(fleet.redis.foreign)


FLEET_CHECKS: Mapping[str, FleetCheck] = MappingProxyType(
    {
        "models": _models,
        "block sizes": _sizes,
        "publishers": _publishers,
        "redis": _redis,
        "scheme": _scheme,
        "writers": _writers,
        "matches": _foreign,
    }
)
CHECKS = ("health", "model", *POD_CHECKS, *FLEET_CHECKS)
"""The names of all checks."""
