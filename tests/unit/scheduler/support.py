"""Small builders, and a clock that the test moves."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from matrixinfer.config import PluginArgs, PluginRef, PluginsConfig, PluginStage, SchedulerConfig
from matrixinfer.scheduler.framework import Candidate, Condition, Plugin, SchedulingRequest, Services
from matrixinfer.scheduler.plugins import BUILT_IN
from matrixinfer.scheduler.scheduler import Scheduler

Enabled = Sequence[str | PluginRef]


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def services(seed: int = 0) -> Services:
    return Services(clock=FakeClock(), rng=random.Random(seed))


def profile(
    *,
    filters: Enabled = (),
    scorers: Enabled = (),
    pickers: Enabled = ("max-score",),
    listeners: Enabled = (),
    args: Sequence[PluginArgs] = (),
) -> SchedulerConfig:
    return SchedulerConfig(
        plugin_config=tuple(args),
        plugins=PluginsConfig(
            filter=_stage(filters),
            score=_stage(scorers),
            picker=_stage(pickers),
            post_schedule=_stage(listeners),
        ),
    )


def _stage(enabled: Enabled) -> PluginStage:
    return PluginStage(enabled=tuple(PluginRef(name=each) if isinstance(each, str) else each for each in enabled))


def scheduler(
    config: SchedulerConfig, *own: type[Plugin], seed: int = 0, broken: Mapping[str, str] | None = None
) -> Scheduler:
    registry: Mapping[str, type[Plugin]] = {**BUILT_IN, **{plugin.name: plugin for plugin in own}}
    return Scheduler(config, services(seed), registry, broken=broken or {})


def request(**fields: Any) -> SchedulingRequest:
    given = {"id": "r", "model": "m", "prompt_tokens": 40, "block_size": 10, "chain": (1, 2, 3, 4), "prefix": b""}
    return SchedulingRequest(**{**given, **fields})


def pod(name: str, **fields: Any) -> Candidate:
    """A candidate. The fields of its condition are given like its own."""
    parts = {field: fields.pop(field) for field in Condition.__struct_fields__ if field in fields}
    return Candidate(name=name, url=f"http://{name}", condition=Condition(**parts), **fields)


def pods(count: int, **fields: Any) -> list[Candidate]:
    return [pod(f"pod-{i}", **fields) for i in range(count)]
