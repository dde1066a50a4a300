"""Plugins of other packages, found through their entry points."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from matrixinfer.app.service import Service
from matrixinfer.cli import main
from matrixinfer.config import (
    Config,
    ModelConfig,
    PluginArgs,
    PluginRef,
    PluginsConfig,
    PluginStage,
    PodConfig,
    SchedulerConfig,
)
from matrixinfer.errors import ConfigError
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

class Raising(Longest):
    name = "raising"

    def score(self, request, candidates):
        raise ValueError(request.prefix)

class NoStage(Plugin):
    name = "no-stage"
    Args = Section

class NoArgs:
    name = "no-args"

class Random(Longest):
    name = "random"

not_a_class = "text"
"""

MUTE = """
class Mute(Exception):
    def __str__(self):
        raise SystemExit

raise Mute
"""


class Site:
    """A folder on `sys.path` in which distributions are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "acme_plugins.py").write_text(GOOD)
        (folder / "acme_broken.py").write_text("import a_module_that_is_not_there")
        (folder / "acme_leaving.py").write_text("raise SystemExit(3)")
        (folder / "acme_mute.py").write_text(MUTE)
        (folder / "acme_interrupted.py").write_text("raise KeyboardInterrupt")

    def declare(self, *entries: str, package: str = "acme-plugins") -> None:
        info = self.folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join([f"[{plugin_loader.GROUP}]", *entries]))
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    yield Site(tmp_path)
    sys.modules.pop("acme_plugins", None)


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
    ("entry", "reason"),
    [
        ("broken = acme_broken:Plugin", "cannot be imported: ModuleNotFoundError"),
        ("leaving = acme_leaving:Plugin", "cannot be imported: SystemExit: 3"),
        ("mute = acme_mute:Plugin", "cannot be imported: Mute: (its message cannot be read)"),
        ("missing = acme_plugins:Missing", "cannot be imported: AttributeError"),
        ("text = acme_plugins:not_a_class", "expected a class"),
        (
            "other-name = acme_plugins:Longest",
            "the class has the name 'longest-name', expected that of its entry point",
        ),
        ("no-args = acme_plugins:NoArgs", "expected a class `Args`"),
        ("no-stage = acme_plugins:NoStage", "expected the method of a stage"),
    ],
)
def test_a_broken_plugin_is_listed_with_the_reason_and_refused_where_it_is_enabled(
    site: Site, entry: str, reason: str
) -> None:
    name, _, value = entry.partition(" = ")
    site.declare(entry)
    installed = plugin_loader.discover()
    assert dict(installed) == dict(BUILT_IN)
    assert list(installed.broken) == [name]
    assert installed.broken[name].startswith(f"{value}: {reason}")

    def made(config: SchedulerConfig) -> Scheduler:
        services = Services(clock=lambda: 0.0, rng=random.Random(0))
        return Scheduler(config, services, installed, broken=installed.broken)

    made(SchedulerConfig(plugin_config=(PluginArgs(name=name, args={"old": 1}),)))  # turned off, its arguments stay
    with pytest.raises(ConfigError) as caught:
        made(SchedulerConfig(plugins=PluginsConfig(score=PluginStage(enabled=(PluginRef(name=name),)))))
    assert caught.value.path == "$.scheduler.plugins.Score.enabled[0]"
    assert caught.value.message == f"the plugin `{name}` cannot be used: {installed.broken[name]}"


def test_an_import_that_the_user_interrupts_is_interrupted(site: Site) -> None:
    site.declare("interrupted = acme_interrupted:Plugin")
    with pytest.raises(KeyboardInterrupt):
        plugin_loader.discover()


def test_a_built_in_plugin_keeps_its_name(site: Site) -> None:
    site.declare("random = acme_plugins:Random")
    installed = plugin_loader.discover()
    assert dict(installed) == dict(BUILT_IN)
    assert installed.broken["random"].startswith("acme_plugins:Random: the built-in plugin has that name")


def test_a_name_that_two_packages_claim_belongs_to_neither(site: Site) -> None:
    site.declare("longest-name = acme_plugins:Longest")
    site.declare("longest-name = acme_more:Longest", package="acme-more")
    installed = plugin_loader.discover()
    assert "longest-name" not in installed
    assert "acme_more:Longest, acme_plugins:Longest" in installed.broken["longest-name"]


def test_checking_a_configuration_lists_broken_plugins(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.declare("broken = acme_broken:Plugin")
    file = tmp_path / "config.yaml"
    file.write_text("{}")
    assert main(["config", "check", str(file)]) == 0
    assert "the installed plugin `broken` cannot be used: acme_broken:Plugin: cannot" in capsys.readouterr().err


async def test_a_gateway_starts_beside_a_broken_plugin_and_says_so(site: Site) -> None:
    site.declare("broken = acme_broken:Plugin")
    with structlog.testing.capture_logs() as logs:
        async with Service(Config(listen="127.0.0.1:0", admin=None)):
            pass
    (line,) = [line for line in logs if line["event"] == "plugin_skipped"]
    assert (line["plugin"], line["log_level"]) == ("broken", "warning")
    assert "cannot be imported: ModuleNotFoundError" in line["reason"]


async def test_a_gateway_logs_a_failing_plugin_and_says_nothing_of_the_prompt(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrixinfer.app.engines.FIRST_LOOK_SECONDS", 0.01)
    site.declare("raising = acme_plugins:Raising")
    config = Config(
        listen="127.0.0.1:0",
        admin=None,
        models=(ModelConfig(name="m"),),
        pods=(PodConfig(name="a", url="http://127.0.0.1:1", kv_events="none"),),
        scheduler=SchedulerConfig(plugins=PluginsConfig(score=PluginStage(enabled=(PluginRef(name="raising"),)))),
    )
    body = b'{"model": "m", "prompt": "secret"}'
    with structlog.testing.capture_logs() as logs:
        async with Service(config) as service:
            for _ in range(2):
                await service.router.explain("/v1/completions", body)
    (line,) = [line for line in logs if line["event"] == "plugin_failed"]
    assert (line["plugin"], line["stage"]) == ("raising", "Score")
    assert line["traceback"][-1] == "ValueError"
    assert line["traceback"][-2].endswith(":Raising.score")
    assert "secret" not in repr(line)
