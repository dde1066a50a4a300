"""One form for settings that can be written in more than one way, so that the rest of the code reads only that form.

- A plugin that is enabled by its name alone becomes a `PluginRef`.
- Arguments in `pluginConfig` are merged over the shipped defaults: an entry changes only what it names.
- `blockSizeToHash` and `hashScheme`, arguments of `kvcache-aware`, are aliases of `blocks.size` and `blocks.scheme`, and
  move there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, cast

import msgspec

from matrixinfer.config.base import Count, Section, convert
from matrixinfer.config.scheduling import BlocksConfig, PluginArgs, SchedulerConfig
from matrixinfer.errors import ConfigError

_ALIASED_IN = "kvcache-aware"
_ALIASES = {"blockSizeToHash": "size", "hashScheme": "scheme"}
"""Arguments of that plugin, and the keys of `blocks` that they stand for."""


class _BlockAliases(Section, frozen=True):
    """The aliases, with the types of the keys that they stand for."""

    block_size_to_hash: Count | None = None
    hash_scheme: Literal["prefix", "block"] | None = None


def with_plugin_refs(data: object) -> object:
    """A YAML document with every plugin that is enabled by its name written as `{name: NAME}`.

    Everything else that does not fit the schema stays as it is, and the schema refuses it. An entry that is neither a
    name nor a mapping raises `ConfigError` here, as the schema knows only the second form.
    """
    plugins = _at(data, "scheduler", "plugins")
    if not isinstance(plugins, dict):
        return data
    stages = {stage: _with_refs(config, f"$.scheduler.plugins.{stage}") for stage, config in plugins.items()}
    document = cast("dict[str, Any]", data)
    return {**document, "scheduler": {**document["scheduler"], "plugins": stages}}


def with_shipped_arguments(config: SchedulerConfig) -> SchedulerConfig:
    """The arguments given, merged over the shipped ones; entries keep their places, so that errors name the right one.

    Raises `ConfigError` for a plugin that has two entries.
    """
    shipped = {entry.name: entry for entry in SchedulerConfig().plugin_config}
    merged: dict[str, PluginArgs] = {}
    for i, entry in enumerate(config.plugin_config):
        if entry.name in merged:
            raise ConfigError(
                f"$.scheduler.pluginConfig[{i}].name",
                f"`{entry.name}` already has an entry above; expected all its arguments in one entry",
            )
        defaults = shipped.pop(entry.name, None)
        args = {**(defaults.args if defaults else {}), **entry.args}
        merged[entry.name] = PluginArgs(name=entry.name, args=args)
    return msgspec.structs.replace(config, plugin_config=(*merged.values(), *shipped.values()))


def with_aliases(blocks: BlocksConfig, scheduler: SchedulerConfig, *, given: Collection[str]) -> BlocksConfig:
    """`blocks` with the values that are given by their aliases. `given` are the keys of `blocks` that are given themselves.

    A key whose value is not its default counts as given, too. Raises `ConfigError` for an alias whose value is bad, or
    contradicts its key.
    """
    changes: dict[str, Any] = {}
    for alias, value, path in _aliases(scheduler):
        key = _ALIASES[alias]
        current = getattr(blocks, key)
        if value == current:
            continue
        if key in given or current != getattr(BlocksConfig(), key):
            raise ConfigError(
                path,
                f"`{value}` contradicts `{current}` at `$.blocks.{key}`, and `{alias}` is an alias of that key: "
                f"remove `{alias}`, or give both the same value",
            )
        changes[key] = value
    return msgspec.structs.replace(blocks, **changes)


def _aliases(scheduler: SchedulerConfig) -> Iterator[tuple[str, object, str]]:
    """Each alias that is given, with its value and its path."""
    for i, entry in enumerate(scheduler.plugin_config):
        if entry.name == _ALIASED_IN:
            path = f"$.scheduler.pluginConfig[{i}].args"
            args = {key: value for key, value in entry.args.items() if key in _ALIASES}
            for alias, value in msgspec.to_builtins(convert(args, _BlockAliases, path=path)).items():
                if value is not None:
                    yield alias, value, f"{path}.{alias}"


def without_aliases(scheduler: SchedulerConfig) -> SchedulerConfig:
    """The configuration without aliases, once they have set what they stand for."""
    entries = tuple(
        PluginArgs(name=entry.name, args={key: value for key, value in entry.args.items() if key not in _ALIASES})
        if entry.name == _ALIASED_IN
        else entry
        for entry in scheduler.plugin_config
    )
    return msgspec.structs.replace(scheduler, plugin_config=entries)


def given_block_keys(data: object) -> frozenset[str]:
    """The keys of `blocks` that a YAML document gives."""
    blocks = _at(data, "blocks")
    return frozenset(map(str, blocks)) if isinstance(blocks, dict) else frozenset()


def _with_refs(stage: object, path: str) -> object:
    enabled = _at(stage, "enabled")
    if not isinstance(enabled, list):
        return stage
    refs = [_ref(entry, f"{path}.enabled[{i}]") for i, entry in enumerate(enabled)]
    return {**cast("dict[str, Any]", stage), "enabled": refs}


def _ref(entry: object, path: str) -> object:
    if isinstance(entry, str):
        return {"name": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(path, f"expected a plugin's name or `{{name, weight}}`, got `{entry}`")
    return entry


def _at(data: object, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data
