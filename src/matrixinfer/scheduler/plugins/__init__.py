"""The built-in plugins. Packages add others by entry points: see `matrixinfer.scheduler.plugin_loader`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from matrixinfer.scheduler.framework import Plugin
from matrixinfer.scheduler.plugins.bounded_load import BoundedLoad
from matrixinfer.scheduler.plugins.expected_ttft import ExpectedTtft
from matrixinfer.scheduler.plugins.gpu_cache_usage import GpuCacheUsage
from matrixinfer.scheduler.plugins.kvcache_aware import KvCacheAware
from matrixinfer.scheduler.plugins.least_prefill import LeastPrefill
from matrixinfer.scheduler.plugins.least_request import LeastRequest
from matrixinfer.scheduler.plugins.lora_affinity import LoraAffinity
from matrixinfer.scheduler.plugins.max_score import MaxScore
from matrixinfer.scheduler.plugins.prefix_cache import PrefixCache
from matrixinfer.scheduler.plugins.random import Random
from matrixinfer.scheduler.plugins.round_robin import RoundRobin
from matrixinfer.scheduler.plugins.session_affinity import SessionAffinity

_CLASSES: tuple[type[Plugin], ...] = (
    BoundedLoad,
    ExpectedTtft,
    GpuCacheUsage,
    KvCacheAware,
    LeastPrefill,
    LeastRequest,
    LoraAffinity,
    MaxScore,
    PrefixCache,
    Random,
    RoundRobin,
    SessionAffinity,
)

BUILT_IN: Mapping[str, type[Plugin]] = MappingProxyType({plugin.name: plugin for plugin in _CLASSES})
"""Plugin name to class."""
