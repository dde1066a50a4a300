"""From configuration to plugin instances: which plugins run at which stage. Errors name the key that is wrong."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from matrixinfer.config import PluginStage, SchedulerConfig, Section, convert
from matrixinfer.errors import ConfigError, message_of
from matrixinfer.scheduler.framework import Filter, Picker, Plugin, PostSchedule, Scorer, Services

_PATH = "$.scheduler"
_METHODS = {"Filter": "filter", "Score": "score", "Picker": "pick", "PostSchedule": "post_schedule"}
"""The method that a plugin needs to run at a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Plugin instances by stage, in the order in which they run."""

    plugins: Mapping[str, Plugin]
    """Every enabled plugin. One that is enabled at several stages is one instance."""
    filters: tuple[tuple[str, Filter], ...]
    scorers: tuple[tuple[str, float, Scorer], ...]
    picker: tuple[str, Picker]
    listeners: tuple[tuple[str, PostSchedule], ...]
    """Plugins that see decisions: every enabled plugin that has the method, at whatever stage it is enabled."""
    reads_bytes: bool
    """Whether any plugin asks for the prompt's chunks; see `framework.Plugin`."""
    needs_session: frozenset[str]
    """The plugins that are left out where a request has no session."""


def build(
    config: SchedulerConfig, services: Services, registry: Mapping[str, type[Plugin]], broken: Mapping[str, str]
) -> Profile:
    """Make one instance of each enabled plugin.

    Raises `ConfigError` at the key of: a plugin that is unknown, broken or cannot be made; a plugin that lacks the stage
    it is enabled for, or is enabled twice there; arguments that do not fit or are given twice; and anything but exactly
    one picker.
    """
    known = _Known(registry, broken)
    filters = _enabled("Filter", config.plugins.filter, known)
    scorers = _enabled("Score", config.plugins.score, known)
    pickers = _enabled("Picker", config.plugins.picker, known)
    listeners = _enabled("PostSchedule", config.plugins.post_schedule, known)
    if len(pickers) != 1:
        raise ConfigError(f"{_PATH}.plugins.Picker.enabled", f"expected exactly one picker, got {len(pickers)}")
    ((picker, _),) = pickers.values()
    paths: dict[str, str] = {}
    for path, (name, _) in (*filters.items(), *scorers.items(), *pickers.items(), *listeners.items()):
        paths.setdefault(name, path)
    args = _arguments(config, known, paths)
    plugins = {name: _made(name, registry[name], args[name], services, path) for name, path in paths.items()}
    return Profile(
        plugins=plugins,
        filters=tuple((name, cast("Filter", plugins[name])) for name, _ in filters.values()),
        scorers=tuple((name, weight, cast("Scorer", plugins[name])) for name, weight in scorers.values()),
        picker=(picker, cast("Picker", plugins[picker])),
        listeners=tuple(
            (name, cast("PostSchedule", plugin))
            for name, plugin in plugins.items()
            if _has(plugin, _METHODS["PostSchedule"])
        ),
        reads_bytes=any(_is_set(plugin, "reads_bytes") for plugin in plugins.values()),
        needs_session=frozenset(name for name, plugin in plugins.items() if _is_set(plugin, "needs_session")),
    )


@dataclass(frozen=True, slots=True)
class _Known:
    registry: Mapping[str, type[Plugin]]
    broken: Mapping[str, str]

    def named(self, name: str, path: str) -> type[Plugin]:
        """The plugin's class. Raises `ConfigError` at `path` if it is unknown or broken."""
        if name in self.registry:
            return self.registry[name]
        if name in self.broken:
            raise ConfigError(path, f"the plugin `{name}` cannot be used: {self.broken[name]}")
        near = difflib.get_close_matches(name, self.registry, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigError(path, f"unknown plugin `{name}`; {hint}expected one of: {_listed(self.registry)}")


def _arguments(config: SchedulerConfig, known: _Known, enabled: Iterable[str]) -> dict[str, Section]:
    """Check the arguments that are given, also those of plugins that are not enabled, and add the defaults of the others.

    Arguments of a broken plugin cannot be checked. They are no error, so that turning the plugin off is enough.
    """
    found: dict[str, Section] = {}
    for i, entry in enumerate(config.plugin_config):
        path = f"{_PATH}.pluginConfig[{i}]"
        if entry.name not in known.registry and entry.name in known.broken:
            continue
        plugin = known.named(entry.name, f"{path}.name")
        if entry.name in found:
            raise ConfigError(f"{path}.name", f"`{entry.name}` already has its arguments above")
        found[entry.name] = _converted(entry.name, plugin, entry.args, f"{path}.args")
    for name in enabled:
        if name not in found:
            path = f"{_PATH}.pluginConfig"
            try:
                found[name] = _converted(name, known.registry[name], {}, path)
            except ConfigError as error:
                raise ConfigError(path, f"`{name}` is enabled without an entry here: {error.message}") from error
    return found


def _converted(name: str, plugin: type[Plugin], args: Mapping[str, object], path: str) -> Section:
    try:
        return convert(args, plugin.Args, path=path)
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:  # Supervision boundary: `Args` is someone's code.
        raise ConfigError(path, f"the `Args` of `{name}` cannot be read: {_in_words(error)}") from error


def _made(name: str, plugin: type[Plugin], args: Section, services: Services, path: str) -> Plugin:
    try:
        return plugin(args, services)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Supervision boundary: the constructor is someone's code.
        trace = error.__traceback__
        if isinstance(error, TypeError) and trace is not None and trace.tb_next is None:
            problem = "has another signature than `__init__(self, args, services)`"
        else:
            problem = "failed"
        raise ConfigError(path, f"the constructor of `{name}` {problem}: {_in_words(error)}") from error


def _enabled(stage: str, config: PluginStage, known: _Known) -> dict[str, tuple[str, float]]:
    """Name and weight of the plugins of a stage, by their paths."""
    found: dict[str, tuple[str, float]] = {}
    method = _METHODS[stage]
    for i, ref in enumerate(config.enabled):
        path = f"{_PATH}.plugins.{stage}.enabled[{i}]"
        if not _has(known.named(ref.name, path), method):
            able = (name for name, plugin in known.registry.items() if _has(plugin, method))
            raise ConfigError(path, f"`{ref.name}` cannot run at stage {stage}; expected one of: {_listed(able)}")
        if any(name == ref.name for name, _ in found.values()):
            raise ConfigError(path, f"`{ref.name}` is already enabled at stage {stage}")
        if not math.isfinite(ref.weight):
            raise ConfigError(f"{path}.weight", f"expected a finite number, got {ref.weight}")
        found[path] = (ref.name, ref.weight)
    return found


def _is_set(plugin: Plugin, flag: str) -> bool:
    return _has(plugin, flag) and getattr(plugin, flag, False) is True


def _has(plugin: type[Plugin] | Plugin, method: str) -> bool:
    """Whether a plugin has a method. One that cannot even be looked up counts as missing."""
    try:
        return hasattr(plugin, method)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # Supervision boundary: the attribute is someone's code.
        return False


def _in_words(error: BaseException) -> str:
    """Type, message and place of an error, which at start can quote no prompt."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" ({trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno})"
    return f"{type(error).__name__}: {message_of(error)}{place}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
