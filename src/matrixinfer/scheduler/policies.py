"""Ready-made scheduler profiles, with the usual names of routing policies."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from matrixinfer.config import PluginRef, PluginsConfig, PluginStage, SchedulerConfig


def _profile(*scorers: PluginRef) -> PluginsConfig:
    return PluginsConfig(score=PluginStage(enabled=scorers))


POLICIES: Mapping[str, PluginsConfig] = MappingProxyType(
    {
        "kv_aware": PluginsConfig(),
        "cached_share": PluginsConfig(
            filter=PluginStage(enabled=(PluginRef(name="least-request"), PluginRef(name="bounded-load"))),
            score=PluginStage(enabled=(PluginRef(name="kvcache-aware"), PluginRef(name="least-prefill"))),
        ),
        "cache_aware": _profile(PluginRef(name="prefix-cache", weight=2.0), PluginRef(name="least-request")),
        "least_load": _profile(PluginRef(name="least-request")),
        "round_robin": _profile(PluginRef(name="round-robin")),
        "random": _profile(PluginRef(name="random")),
    }
)
"""`kv_aware` is the default: it chooses by estimated milliseconds to the first token. `cached_share` was the default before:
it weighs the cached share of a prompt against queued tokens. `cache_aware` uses only the gateway's own history: no events,
no tokens."""


def with_policy(scheduler: SchedulerConfig, policy: str) -> SchedulerConfig:
    """The configuration with the profile of `policy`. Plugin arguments stay. Raises `KeyError`."""
    return msgspec.structs.replace(scheduler, plugins=POLICIES[policy])
