"""From configuration to plugin instances: which plugins run at which stage, with every mistake named at its key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from matrixinfer.config import PluginRef, PluginStage, SchedulerConfig, Section, convert
from matrixinfer.errors import ConfigError
from matrixinfer.scheduler.framework import Filter, Picker, Plugin, PostSchedule, Scorer, Services

_PATH = "$.scheduler"
_METHODS = {"Filter": "filter", "Score": "score", "Picker": "pick", "PostSchedule": "post_schedule"}
"""What a plugin needs to run at a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Plugin instances by stage, in the order in which they run."""

    plugins: Mapping[str, Plugin]
    """Every enabled plugin, once, whatever the number of its stages."""
    filters: tuple[tuple[str, Filter], ...]
    scorers: tuple[tuple[str, float, Scorer], ...]
    picker: tuple[str, Picker]
    listeners: tuple[tuple[str, PostSchedule], ...]
    """Those that learn of decisions: enabled at PostSchedule, or elsewhere and able to."""


def build(config: SchedulerConfig, services: Services, registry: Mapping[str, type[Plugin]]) -> Profile:
    """Make one instance of each enabled plugin.

    Raises `ConfigError` at the key of: an unknown plugin, a plugin that lacks the stage it is enabled for or is enabled
    twice there, arguments that do not fit or are given twice, and anything but exactly one picker.
    """
    filters = _enabled("Filter", config.plugins.filter, registry)
    scorers = _enabled("Score", config.plugins.score, registry)
    pickers = _enabled("Picker", config.plugins.picker, registry)
    listeners = _enabled("PostSchedule", config.plugins.post_schedule, registry)
    if len(pickers) != 1:
        raise ConfigError(f"{_PATH}.plugins.Picker.enabled", f"expected exactly one picker, got {len(pickers)}")
    picker = pickers[0].name
    names = dict.fromkeys(ref.name for ref in (*filters, *scorers, *pickers, *listeners))
    args = _arguments(config, registry, names)
    plugins = {name: registry[name](args[name], services) for name in names}
    return Profile(
        plugins=plugins,
        filters=tuple((ref.name, cast("Filter", plugins[ref.name])) for ref in filters),
        scorers=tuple((ref.name, ref.weight, cast("Scorer", plugins[ref.name])) for ref in scorers),
        picker=(picker, cast("Picker", plugins[picker])),
        listeners=tuple((name, plugin) for name, plugin in plugins.items() if isinstance(plugin, PostSchedule)),
    )


def arguments_of(config: SchedulerConfig, plugin: type[Plugin]) -> Section:
    """The arguments that a plugin has, or would have if it were enabled. Raises `ConfigError`."""
    for i, entry in enumerate(config.plugin_config):
        if entry.name == plugin.name:
            return convert(entry.args, plugin.Args, path=f"{_PATH}.pluginConfig[{i}].args")
    return convert({}, plugin.Args, path=f"{_PATH}.pluginConfig.{plugin.name}.args")


def _arguments(
    config: SchedulerConfig, registry: Mapping[str, type[Plugin]], enabled: Iterable[str]
) -> dict[str, Section]:
    """Check the arguments given, also of plugins that are not enabled, and fill in the defaults of those that are."""
    found: dict[str, Section] = {}
    for i, entry in enumerate(config.plugin_config):
        path = f"{_PATH}.pluginConfig[{i}]"
        plugin = _plugin_named(entry.name, registry, f"{path}.name")
        if entry.name in found:
            raise ConfigError(f"{path}.name", f"`{entry.name}` already has its arguments above")
        found[entry.name] = convert(entry.args, plugin.Args, path=f"{path}.args")
    for name in enabled:
        if name not in found:
            found[name] = convert({}, registry[name].Args, path=f"{_PATH}.pluginConfig.{name}.args")
    return found


def _enabled(stage: str, config: PluginStage, registry: Mapping[str, type[Plugin]]) -> list[PluginRef]:
    refs: list[PluginRef] = []
    method = _METHODS[stage]
    for i, entry in enumerate(config.enabled):
        path = f"{_PATH}.plugins.{stage}.enabled[{i}]"
        ref = PluginRef(name=entry) if isinstance(entry, str) else entry
        if not hasattr(_plugin_named(ref.name, registry, path), method):
            able = (name for name, plugin in registry.items() if hasattr(plugin, method))
            raise ConfigError(path, f"`{ref.name}` cannot run at stage {stage}; these can: {_listed(able)}")
        if any(other.name == ref.name for other in refs):
            raise ConfigError(path, f"`{ref.name}` is already enabled at stage {stage}")
        if not math.isfinite(ref.weight):
            raise ConfigError(f"{path}.weight", f"expected a finite number, got {ref.weight}")
        refs.append(ref)
    return refs


def _plugin_named(name: str, registry: Mapping[str, type[Plugin]], path: str) -> type[Plugin]:
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, registry, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise ConfigError(path, f"unknown plugin `{name}`; {hint}there are: {_listed(registry)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
