"""From a YAML file to a `Config`: read once, checked completely, completed from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml

from matrixinfer.config.access import QuotaConfig, check_access
from matrixinfer.config.api import check_api
from matrixinfer.config.base import convert
from matrixinfer.config.discovery import MAX_PODS, absolute_paths, check_discovery
from matrixinfer.config.engine_keys import key_places
from matrixinfer.config.files import with_absolute_files
from matrixinfer.config.fleet import CLUSTER_SUFFIX, KvEventsConfig, ModelConfig, PodConfig
from matrixinfer.config.index import RedisConfig
from matrixinfer.config.normalise import (
    given_block_keys,
    with_aliases,
    with_plugin_refs,
    with_shipped_arguments,
    without_aliases,
)
from matrixinfer.config.routes import check_routes
from matrixinfer.config.schema import Config
from matrixinfer.config.secrets import place
from matrixinfer.config.tls import check_engine_tls, check_tls
from matrixinfer.config.tracing import check_tracing
from matrixinfer.errors import ConfigError

_MAX_NAME_CHARS = 253
"""Of a pod: as many as a DNS name has at most."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML silently keeps the last of two equal keys; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a mapping that has a key twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key.value}`", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load(path: Path) -> Config:
    """Read and check a YAML file. Relative paths start from the file's folder.

    Raises `ConfigError` when the file cannot be read, is not YAML, or does not fit the schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("$", f"cannot read {path}: {error}") from error
    return parse(text, base=path.parent)


def parse(text: str, *, base: Path) -> Config:
    """Check a YAML document; `base` is the folder that relative paths start from. Raises `ConfigError`."""
    data = yaml_data(text)
    config = with_absolute_files(convert(with_plugin_refs({} if data is None else data), Config, path="$"), base)
    config = msgspec.structs.replace(
        config,
        models=tuple(_with_tokenizer_paths(model, base) for model in config.models),
        access_log=config.access_log and config.access_log.located(base),
        discovery=absolute_paths(config.discovery, base),
    )
    return checked(config, given_blocks=given_block_keys(data))


def parse_pods(text: str, *, base: Path) -> tuple[PodConfig, ...]:
    """A YAML or JSON list of pods, checked as `pods` of the configuration is. `base` is as for `parse`.

    Raises `ConfigError`.
    """
    data = yaml_data(text)
    if isinstance(data, dict) and data.keys() == {"pods"}:
        data = data["pods"]
    if not isinstance(data, list):
        raise ConfigError(
            "$.pods", f"expected a list of pods, got {'nothing' if data is None else type(data).__name__}"
        )
    pods = convert(data, tuple[PodConfig, ...], path="$.pods")
    return checked_pods(tuple(with_absolute_files(pod, base) for pod in pods))


def checked_pods(pods: Sequence[PodConfig]) -> tuple[PodConfig, ...]:
    """Pods that were given outside of the config file, checked and completed alike. Raises `ConfigError`."""
    if len(pods) > MAX_PODS:
        raise ConfigError("$.pods", f"expected at most {MAX_PODS} pods, got {len(pods)}")
    _check_pods(pods)
    for i, pod in enumerate(pods):
        place(pod.api_key_file, pod.api_key_env, f"$.pods[{i}].apiKey")
        if pod.tls is not None:
            check_engine_tls(pod.tls, f"$.pods[{i}].tls")
    return tuple(map(bare_pod, pods))


def yaml_data(text: str) -> Any:
    """What a YAML document has, in which no key is given twice. Raises `ConfigError`."""
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - a safe loader, made stricter
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
    ) as error:
        # Beside its own errors PyYAML raises whatever happens to it in a scalar such as `!!int ''` or a date.
        raise ConfigError("$", f"not valid YAML: {error}") from error


def split_address(address: str, *, path: str) -> tuple[str, int]:
    """`host:port` (or `[v6]:port`) as a pair. Raises `ConfigError` at `path`."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(path, f"expected `host:port`, got `{address}`")
    return host.strip("[]"), int(port)


def checked(config: Config, *, given_blocks: Collection[str] = ()) -> Config:
    """Check what types cannot express, and return the configuration in the one form that the rest of the code expects.

    A configuration made in code goes through this once, too. `given_blocks` are the keys of `blocks` that were given,
    also with their default values. Raises `ConfigError`.
    """
    scheduler = with_shipped_arguments(config.scheduler)
    blocks = with_aliases(config.blocks, scheduler, given=given_blocks)
    _check_names_and_addresses(config)
    check_api(config.api)
    check_routes(config.routes)
    key_places(config)
    check_tls(config)
    if config.access_log is not None:
        config.access_log.key_place()
    check_access(config)
    return msgspec.structs.replace(
        config,
        blocks=blocks,
        scheduler=without_aliases(scheduler),
        pods=tuple(map(bare_pod, config.pods)),
        redis=_checked_redis(config),
    )


def bare_pod(pod: PodConfig) -> PodConfig:
    """The pod with its name without the cluster's suffix, and its URL without a trailing slash."""
    return msgspec.structs.replace(pod, url=pod.url.rstrip("/"), name=pod.name.removesuffix(CLUSTER_SUFFIX))


def _check_names_and_addresses(config: Config) -> None:
    split_address(config.listen, path="$.listen")
    if config.admin is not None:
        split_address(config.admin, path="$.admin")
    seen: dict[str, str] = {}
    for i, model in enumerate(config.models):
        for name in (model.name, *model.aliases):
            if name in seen:
                raise ConfigError(f"$.models[{i}]", f"the name `{name}` is already taken by {seen[name]}")
            seen[name] = f"$.models[{i}]"
    _check_names_in_redis(config.models)
    _check_pods(config.pods)
    check_discovery(config.discovery)
    _check_workers(config)
    check_tracing(config.tracing)


def _check_workers(config: Config) -> None:
    """Each worker counts on its own what keys use, unless all count in Redis."""
    access = config.access
    if config.workers > 1 and access is not None and access.count_in == "local" and access.limits != QuotaConfig():
        raise ConfigError(
            "$.access.countIn",
            f"expected `redis`, as each of the {config.workers} workers would allow all of `access.limits`",
        )


def _check_pods(pods: Sequence[PodConfig]) -> None:
    taken: dict[str, str] = {}
    for i, pod in enumerate(pods):
        name = pod.name.removesuffix(CLUSTER_SUFFIX)
        if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
            raise ConfigError(
                f"$.pods[{i}].name",
                f"expected 1 to {_MAX_NAME_CHARS} printable characters, as it shows in headers, metrics and logs",
            )
        if name in taken:
            raise ConfigError(f"$.pods[{i}].name", f"the name `{name}` is already taken by {taken[name]}")
        taken[name] = f"$.pods[{i}]"
        _check_url(pod.url, path=f"$.pods[{i}].url")
        if isinstance(pod.kv_events, KvEventsConfig):
            for key, value in (("endpoint", pod.kv_events.endpoint), ("replayEndpoint", pod.kv_events.replay_endpoint)):
                if value is not None and not re.match(r"(tcp://[^*]+:\d+|ipc://.+|inproc://.+)$", value):
                    raise ConfigError(f"$.pods[{i}].kvEvents.{key}", f"expected `tcp://host:port`, got `{value}`")


def _check_names_in_redis(models: Sequence[ModelConfig]) -> None:
    in_redis: dict[str, str] = {}
    for i, model in enumerate(models):
        name = model.name if model.index_name is None else model.index_name
        if name in in_redis:
            raise ConfigError(
                f"$.models[{i}].{'name' if model.index_name is None else 'indexName'}",
                f"expected a name of its own in Redis, but `{name}` is that of {in_redis[name]}",
            )
        if not name:
            raise ConfigError(f"$.models[{i}].indexName", "expected a name, got an empty one")
        in_redis[name] = f"$.models[{i}]"


def _checked_redis(config: Config) -> RedisConfig | None:
    """The server, if one is named or needed, completed from the environment."""
    redis, index = config.redis, config.index
    if index.kind == "redis" and index.warm_start:
        raise ConfigError(
            "$.index.warmStart",
            "works with kind `memory` only: kind `redis` always looks up in Redis; remove `warmStart`",
        )
    if index.kind == "memory" and index.writer == "none":
        raise ConfigError(
            "$.index.writer", "`none` works with kind `redis` only: nobody else can write to this process's memory"
        )
    if index.lease_seconds > index.max_age_seconds:
        raise ConfigError(
            "$.index.leaseSeconds", f"expected at most `maxAgeSeconds`, which is {index.max_age_seconds:g}"
        )
    if redis is None:
        counts = config.access is not None and config.access.count_in == "redis"
        needed = index.kind == "redis" or index.warm_start or index.writer == "gateway" or counts
        return _with_environment(RedisConfig(), os.environ) if needed else None
    for i, address in enumerate(redis.sentinels):
        split_address(address, path=f"$.redis.sentinels[{i}]")
    if sum((redis.socket is not None, bool(redis.sentinels), redis.cluster)) > 1:
        raise ConfigError("$.redis", "expected at most one of `socket`, `sentinels` and `cluster`")
    if redis.cluster and redis.db:
        raise ConfigError("$.redis.db", "expected 0: a Cluster has only database 0")
    return _with_environment(redis, os.environ)


def _with_environment(redis: RedisConfig, environment: Mapping[str, str]) -> RedisConfig:
    port = environment.get("REDIS_PORT") or "6379"
    if redis.port is None and not (port.isdecimal() and 0 < int(port) < 65_536):
        raise ConfigError("$.redis.port", f"expected a port in the environment variable REDIS_PORT, got `{port}`")
    return msgspec.structs.replace(
        redis,
        host=redis.host or environment.get("REDIS_HOST") or "127.0.0.1",
        port=redis.port or int(port),
        password=redis.password or environment.get("REDIS_PASSWORD") or None,
    )


def _check_url(url: str, *, path: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is not a number, or half an IPv6 address
        usable = False
    if not usable or re.search(r"[?#\s]", url):
        raise ConfigError(path, f"expected `http://host:port`, got `{url}`")
    if "@" in parts.netloc:
        raise ConfigError(
            path,
            "expected a URL without a user name and password: it shows in logs, metrics and answers. "
            "Name the engine's key with `apiKeyFile` or `apiKeyEnv`",
        )
    bare = url.rstrip("/")
    if bare.endswith("/v1"):
        raise ConfigError(path, f"expected a base URL without `/v1`: did you mean `{bare.removesuffix('/v1')}`?")


def _with_tokenizer_paths(model: ModelConfig, base: Path) -> ModelConfig:
    def resolve(value: str | None) -> str | None:
        return value if value is None else str((base / value).resolve())

    template = model.chat_template
    return msgspec.structs.replace(
        model,
        tokenizer=resolve(model.tokenizer),
        chat_template=template if template == "chatml" else resolve(template),
    )
