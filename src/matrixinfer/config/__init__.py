"""The configuration: one YAML file, read once, checked whole before anything starts.

Every section is a frozen struct (`schema`), whose field descriptions are the reference that `docs/configuration.md` is made
from. An unknown key or a bad value raises `ConfigError` with the key's path, what was expected, and the nearest valid
name (`complaints`).
"""

from matrixinfer.config.reading import bare_pod, checked, convert, load, parse, split_address
from matrixinfer.config.schema import (
    CLUSTER_SUFFIX,
    Config,
    Count,
    DriftConfig,
    IndexConfig,
    KvEventsConfig,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    PluginArgs,
    PluginRef,
    PluginsConfig,
    PluginStage,
    PodConfig,
    PodWatchConfig,
    RedisConfig,
    SchedulerConfig,
    Seconds,
    Section,
    Share,
    TlsConfig,
    TokenizationConfig,
    WeightsConfig,
    described,
)

__all__ = [
    "CLUSTER_SUFFIX",
    "Config",
    "Count",
    "DriftConfig",
    "IndexConfig",
    "KvEventsConfig",
    "LimitsConfig",
    "LogConfig",
    "ModelConfig",
    "PluginArgs",
    "PluginRef",
    "PluginStage",
    "PluginsConfig",
    "PodConfig",
    "PodWatchConfig",
    "RedisConfig",
    "SchedulerConfig",
    "Seconds",
    "Section",
    "Share",
    "TlsConfig",
    "TokenizationConfig",
    "WeightsConfig",
    "bare_pod",
    "checked",
    "convert",
    "described",
    "load",
    "parse",
    "split_address",
]
