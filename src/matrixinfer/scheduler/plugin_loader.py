"""Finds scheduler plugins: the built-in ones, and those that installed packages bring as entry points.

A package names its plugin classes under the group `matrixinfer.plugins`, each under the plugin's own name::

    [project.entry-points."matrixinfer.plugins"]
    my-scorer = "my_package:MyScorer"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import cast

from matrixinfer.config import Section
from matrixinfer.errors import PluginError
from matrixinfer.scheduler.framework import Filter, Picker, Plugin, PostSchedule, Scorer
from matrixinfer.scheduler.plugins import BUILT_IN

GROUP = "matrixinfer.plugins"


def discover() -> Mapping[str, type[Plugin]]:
    """Every plugin by name.

    Raises `PluginError` for an entry that cannot be imported, is no plugin, or takes a name that is taken.
    """
    found = dict(BUILT_IN)
    for entry in entry_points(group=GROUP):
        where = f"plugin `{entry.name}` ({entry.value})"
        plugin = _load(entry, where)
        if entry.name in found:
            taken = found[entry.name]
            raise PluginError(f"{where}: the name is already taken by {taken.__module__}.{taken.__qualname__}")
        found[entry.name] = plugin
    return MappingProxyType(found)


def _load(entry: EntryPoint, where: str) -> type[Plugin]:
    try:
        plugin = entry.load()
    except Exception as error:  # Supervision boundary: importing someone's package may raise anything.
        raise PluginError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(plugin, type):
        raise PluginError(f"{where}: is not a class")
    name = getattr(plugin, "name", None)
    if name != entry.name:
        raise PluginError(f"{where}: the class calls itself {name!r}; entry and class must agree")
    args = getattr(plugin, "Args", None)
    if not (isinstance(args, type) and issubclass(args, Section)):
        raise PluginError(f"{where}: needs a class `Args` derived from `matrixinfer.config.Section`")
    if not any(issubclass(plugin, stage) for stage in (Filter, Scorer, Picker, PostSchedule)):
        raise PluginError(f"{where}: has the method of no stage: filter, score, pick or post_schedule")
    return cast("type[Plugin]", plugin)
