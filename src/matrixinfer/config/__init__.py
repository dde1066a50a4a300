"""The configuration: one YAML file, read once and checked completely before anything starts.

Every section is a frozen struct (`schema`, `scheduling`); `docs/configuration.md` is generated from the descriptions of its
fields. An unknown key or a bad value raises `ConfigError` with the key's path, what was expected, and the nearest
valid name (`complaints`). Settings with more than one spelling are brought into one form (`normalise`).
"""

from matrixinfer.config.access_log import AccessLogConfig
from matrixinfer.config.api import ENGINE_PATHS, OTHER_METHODS, ApiConfig, CorsConfig
from matrixinfer.config.base import Count, Seconds, Section, Share, convert, described
from matrixinfer.config.discovery import DiscoveryConfig, DnsSource, FileSource, name_server
from matrixinfer.config.engine_keys import EngineKeysConfig
from matrixinfer.config.fleet import CLUSTER_SUFFIX, KvEventsConfig, ModelConfig, PodConfig
from matrixinfer.config.index import IndexConfig, RedisConfig, TlsConfig
from matrixinfer.config.limits import (
    ConnectionsConfig,
    DrainConfig,
    LimitsConfig,
    OutliersConfig,
    PodWatchConfig,
    RetriesConfig,
)
from matrixinfer.config.reading import bare_pod, checked, checked_pods, load, parse, parse_pods, split_address
from matrixinfer.config.reload import ReloadConfig
from matrixinfer.config.routes import RouteConfig, RouteTarget
from matrixinfer.config.scheduling import (
    BlocksConfig,
    PluginArgs,
    PluginRef,
    PluginsConfig,
    PluginStage,
    SchedulerConfig,
    WeightsConfig,
)
from matrixinfer.config.schema import Config, DriftConfig, LogConfig, TokenizationConfig
from matrixinfer.config.tls import EngineTlsConfig, ListenerTlsConfig
from matrixinfer.config.tracing import TracingConfig

__all__ = [
    "CLUSTER_SUFFIX",
    "ENGINE_PATHS",
    "OTHER_METHODS",
    "AccessLogConfig",
    "ApiConfig",
    "BlocksConfig",
    "Config",
    "ConnectionsConfig",
    "CorsConfig",
    "Count",
    "DiscoveryConfig",
    "DnsSource",
    "DrainConfig",
    "DriftConfig",
    "EngineKeysConfig",
    "EngineTlsConfig",
    "FileSource",
    "IndexConfig",
    "KvEventsConfig",
    "LimitsConfig",
    "ListenerTlsConfig",
    "LogConfig",
    "ModelConfig",
    "OutliersConfig",
    "PluginArgs",
    "PluginRef",
    "PluginStage",
    "PluginsConfig",
    "PodConfig",
    "PodWatchConfig",
    "RedisConfig",
    "ReloadConfig",
    "RetriesConfig",
    "RouteConfig",
    "RouteTarget",
    "SchedulerConfig",
    "Seconds",
    "Section",
    "Share",
    "TlsConfig",
    "TokenizationConfig",
    "TracingConfig",
    "WeightsConfig",
    "bare_pod",
    "checked",
    "checked_pods",
    "convert",
    "described",
    "load",
    "name_server",
    "parse",
    "parse_pods",
    "split_address",
]
