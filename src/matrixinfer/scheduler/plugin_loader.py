"""Finds scheduler plugins: the built-in ones, and those that installed packages bring as entry points.

A package names its plugin classes in the group `matrixinfer.plugins`, each under the plugin's own name::

    [project.entry-points."matrixinfer.plugins"]
    my-scorer = "my_package:MyScorer"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import cast

from matrixinfer.config import Section
from matrixinfer.errors import PluginError, message_of
from matrixinfer.scheduler.framework import Filter, Picker, Plugin, PostSchedule, Scorer
from matrixinfer.scheduler.plugins import BUILT_IN

GROUP = "matrixinfer.plugins"


class Installed(Mapping[str, type[Plugin]]):
    """The plugins that can be enabled, by name."""

    def __init__(self, usable: Mapping[str, type[Plugin]], broken: Mapping[str, str]) -> None:
        self._usable = MappingProxyType(dict(usable))
        self.broken = MappingProxyType(dict(broken))
        """Name to reason of each installed plugin that cannot be used. It may have the name of one that can."""

    def __getitem__(self, name: str) -> type[Plugin]:
        return self._usable[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._usable)

    def __len__(self) -> int:
        return len(self._usable)


def discover() -> Installed:
    """Find every plugin. A package's plugin is broken if it cannot be imported, is no plugin, or its name is taken.

    A built-in plugin keeps its name. If several packages claim a name, none of them gets it.
    """
    usable: dict[str, type[Plugin]] = dict(BUILT_IN)
    broken: dict[str, str] = {}
    claims: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        if entry not in claims.setdefault(entry.name, []):
            claims[entry.name].append(entry)
    for name, (entry, *others) in claims.items():
        if name in BUILT_IN:
            broken[name] = f"{entry.value}: the built-in plugin has that name; rename this one"
        elif others:
            values = ", ".join(sorted(each.value for each in (entry, *others)))
            broken[name] = f"several packages have a plugin of that name: {values}; uninstall all but one"
        else:
            try:
                usable[name] = _load(entry)
            except PluginError as error:
                broken[name] = f"{entry.value}: {error}"
    return Installed(usable, broken)


def _load(entry: EntryPoint) -> type[Plugin]:
    try:
        plugin = entry.load()
        _check(plugin, entry.name)
    except (KeyboardInterrupt, PluginError):
        raise
    except BaseException as error:  # Supervision boundary: a package's code may raise anything, also `SystemExit`.
        raise PluginError(f"cannot be imported: {type(error).__name__}: {message_of(error)}") from error
    return cast("type[Plugin]", plugin)


def _check(plugin: object, name: str) -> None:
    """Raise `PluginError` unless this is a plugin class of that name."""
    if not isinstance(plugin, type):
        raise PluginError("expected a class")
    if getattr(plugin, "name", None) != name:
        raise PluginError(f"the class has the name {getattr(plugin, 'name', None)!r}, expected that of its entry point")
    args = getattr(plugin, "Args", None)
    if not (isinstance(args, type) and issubclass(args, Section)):
        raise PluginError("expected a class `Args` derived from `matrixinfer.config.Section`")
    if not any(issubclass(plugin, stage) for stage in (Filter, Scorer, Picker, PostSchedule)):
        raise PluginError("expected the method of a stage: filter, score, pick or post_schedule")
