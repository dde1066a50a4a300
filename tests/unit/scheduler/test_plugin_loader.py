"""Plugins of other packages, found through their entry points."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from matrixinfer.config import PluginRef, PluginsConfig, PluginStage, SchedulerConfig
from matrixinfer.errors import PluginError
from matrixinfer.scheduler import plugin_loader
from matrixinfer.scheduler.framework import Candidate, SchedulingRequest, Services
from matrixinfer.scheduler.plugins import BUILT_IN
from matrixinfer.scheduler.scheduler import Scheduler

GOOD = """
from matrixinfer.config import Section
from matrixinfer.scheduler.framework import Plugin, Scores

class Longest(Plugin):
    name = "longest-name"
    Args = Section

    def __init__(self, args, services):
        pass

    def score(self, request, candidates):
        return Scores(values=[float(len(pod.name)) for pod in candidates])

class NoStage(Plugin):
    name = "no-stage"
    Args = Section

class NoArgs:
    name = "no-args"

class Random(Longest):
    name = "random"

not_a_class = "text"
"""


class Site:
    """A folder on `sys.path` with one installed distribution in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "acme_plugins.py").write_text(GOOD)
        (folder / "acme_broken.py").write_text("import a_module_that_is_not_there")

    def declare(self, *entries: str) -> None:
        info = self.folder / "acme_plugins-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-plugins\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join([f"[{plugin_loader.GROUP}]", *entries]))
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    yield Site(tmp_path)
    for module in ("acme_plugins", "acme_broken"):
        sys.modules.pop(module, None)


def test_without_other_packages_there_are_the_built_in_plugins() -> None:
    assert dict(plugin_loader.discover()) == dict(BUILT_IN)


def test_a_plugin_of_another_package_takes_part_in_decisions(site: Site) -> None:
    site.declare("longest-name = acme_plugins:Longest")
    config = SchedulerConfig(plugins=PluginsConfig(score=PluginStage(enabled=(PluginRef(name="longest-name"),))))
    scheduler = Scheduler(config, Services(clock=lambda: 0.0, rng=random.Random(0)), plugin_loader.discover())
    request = SchedulingRequest(id="r", model="m", prompt_tokens=None, block_size=16, chain=(), prefix=b"")
    decision = scheduler.schedule(request, [Candidate(name="a", url=""), Candidate(name="abc", url="")])
    assert decision.chosen.name == "abc"
    assert decision.scores == {"longest-name": {"a": 1.0, "abc": 3.0}}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("broken = acme_broken:Plugin", "cannot be imported: ModuleNotFoundError"),
        ("missing = acme_plugins:Missing", "cannot be imported: AttributeError"),
        ("text = acme_plugins:not_a_class", "is not a class"),
        ("other-name = acme_plugins:Longest", "calls itself 'longest-name'"),
        ("no-args = acme_plugins:NoArgs", "needs a class `Args`"),
        ("no-stage = acme_plugins:NoStage", "has the method of no stage"),
        ("random = acme_plugins:Random", "the name is already taken by matrixinfer.scheduler.plugins.random.Random"),
    ],
)
def test_an_entry_that_is_no_plugin_is_refused_by_name(site: Site, entry: str, words: str) -> None:
    site.declare(entry)
    with pytest.raises(PluginError) as caught:
        plugin_loader.discover()
    assert str(caught.value).startswith(f"plugin `{entry.split(maxsplit=1)[0]}` (")
    assert words in str(caught.value)
