"""The settings that are compared: every ready-made profile, and each of its numbers changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from matrixinfer.config import PluginArgs, PluginRef, PluginStage, SchedulerConfig
from matrixinfer.scheduler.framework import Plugin
from matrixinfer.scheduler.policies import POLICIES, with_policy

DEFAULT = "kv_aware"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A profile with changes to its numbers."""

    profile: str
    changes: tuple[tuple[str, float], ...] = ()
    """Path of each number, such as `least-prefill.scaleTokens` or `session-affinity.weight`, and its value."""
    config: SchedulerConfig

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join((self.profile, *(f"{path} {value:g}" for path, value in self.changes)))


def profiles() -> list[Setting]:
    """Every profile as it is shipped, the default one first. Another name for the same profile is left out."""
    names = [DEFAULT, *(name for name in POLICIES if name != DEFAULT)]
    found: list[Setting] = []
    for name in names:
        config = with_policy(SchedulerConfig(), name)
        if all(config != each.config for each in found):
            found.append(Setting(profile=name, config=config))
    return found


def numbers(config: SchedulerConfig, plugins: Mapping[str, type[Plugin]]) -> dict[str, float]:
    """The numbers of the enabled filters and scorers that can be changed by a factor, by path."""
    found: dict[str, float] = {}
    scorers = config.plugins.score.enabled
    for ref in (*config.plugins.filter.enabled, *scorers):
        args = msgspec.to_builtins(_args(config, plugins[ref.name], ref.name))
        for key, value in args.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                found[f"{ref.name}.{key}"] = value
    for ref in scorers[1:]:  # only ratios of weights matter
        if ref.weight > 0:
            found[f"{ref.name}.weight"] = ref.weight
    return found


def changed(setting: Setting, changes: Mapping[str, float], plugins: Mapping[str, type[Plugin]]) -> Setting | None:
    """A setting with more changes; None if a number may not have that value."""
    config = setting.config
    for path, value in changes.items():
        name, _, key = path.rpartition(".")
        if key == "weight":
            config = _with_weight(config, name, value)
            continue
        config = _with_argument(config, name, key, value)
        try:
            _args(config, plugins[name], name)
        except msgspec.ValidationError:
            return None
    merged = {**dict(setting.changes), **changes}
    return Setting(profile=setting.profile, changes=tuple(sorted(merged.items())), config=config)


def variants(
    setting: Setting, plugins: Mapping[str, type[Plugin]], *, factor: float
) -> Iterator[tuple[str, float, Setting]]:
    """The setting with one number divided by `factor`, or multiplied by it: its path, its value, and the setting."""
    for path, value in numbers(setting.config, plugins).items():
        for each in (value / factor, value * factor):
            rounded: float = round(each) if isinstance(value, int) else float(f"{each:.3g}")
            new = None if rounded == value else changed(setting, {path: rounded}, plugins)
            if new is not None:
                yield path, rounded, new


def _args(config: SchedulerConfig, plugin: type[Plugin], name: str) -> msgspec.Struct:
    given = next((entry.args for entry in config.plugin_config if entry.name == name), {})
    return msgspec.convert(given, plugin.Args)


def _with_argument(config: SchedulerConfig, name: str, key: str, value: float) -> SchedulerConfig:
    entries = {entry.name: entry for entry in config.plugin_config}
    given = entries[name].args if name in entries else {}
    entries[name] = PluginArgs(name=name, args={**given, key: value})
    return msgspec.structs.replace(config, plugin_config=tuple(entries.values()))


def _with_weight(config: SchedulerConfig, name: str, value: float) -> SchedulerConfig:
    refs = tuple(
        PluginRef(name=ref.name, weight=value) if ref.name == name else ref for ref in config.plugins.score.enabled
    )
    plugins = msgspec.structs.replace(config.plugins, score=PluginStage(enabled=refs))
    return msgspec.structs.replace(config, plugins=plugins)
