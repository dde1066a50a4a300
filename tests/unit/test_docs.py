"""What the documentation shows is what the code does."""

from __future__ import annotations

import io
import random
import re
import time
import tomllib
from pathlib import Path

import pytest

from matrixinfer.app.collectors import (
    FeedCollector,
    IndexCollector,
    KeptCollector,
    PluginCollector,
    TokenCacheCollector,
)
from matrixinfer.app.config_reference import configuration_page
from matrixinfer.app.service import build_scheduler
from matrixinfer.cli import main
from matrixinfer.config import PluginRef, SchedulerConfig, TokenizationConfig, parse
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.scheduler.framework import Candidate, SchedulingRequest, Services
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.policies import POLICIES, with_policy
from matrixinfer.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_reference_page_is_what_the_schema_says() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == configuration_page(discover()), "run: matrixinfer config reference > docs/configuration.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_yaml_example_is_a_valid_configuration(page: Path) -> None:
    for text in blocks(page, "yaml"):
        config = parse(text, base=ROOT)
        if "rack" not in text:
            build_scheduler(config.scheduler)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_shipped_profile_is_built_and_bounds_load(policy: str) -> None:
    assert PluginRef(name="bounded-load") in POLICIES[policy].filter.enabled
    build_scheduler(with_policy(SchedulerConfig(), policy))


def test_the_rendering_that_is_shown_is_what_comes_out(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (shown,) = blocks(ROOT / "docs" / "tokenization.md", "console")
    command, expected = shown.split("\n", 1)
    said = re.fullmatch(r"\$ echo '(.*)' \| matrixinfer (.*)", command)
    assert said is not None
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said[1].encode())))
    assert main(said[2].split()) == 0
    assert capfd.readouterr().out == expected


def test_the_architecture_lists_every_module_and_the_layers_as_they_are_enforced() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("| package |") : page.index("## What must hold")]
    for module in (ROOT / "src" / "matrixinfer").iterdir():
        name = f"{module.name}/" if module.is_dir() else module.name
        assert name.startswith(("__", "py.typed")) or f"`{name}`" in table, name
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    enforced = [set(layer.split(" | ")) for layer in contracts[0]["layers"]]
    (shown,) = (text for text in blocks(ROOT / "docs" / "architecture.md", "") if text.startswith("cli ->"))
    assert [set(re.split(r",\s+", layer.strip())) for layer in shown.split("->")] == enforced[1:]


def test_every_metric_is_explained_to_operators() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    shown = re.findall(r"(?:matrixinfer|…)_([a-z_]+?)(?:_total)?[`{ ]", page)
    metrics = Metrics()
    metrics.register(IndexCollector(MemoryIndex()))
    metrics.register(FeedCollector({}, lambda _: False))
    metrics.register(KeptCollector({}))
    metrics.register(TokenCacheCollector(TokenizerManager((), TokenizationConfig(), None)))
    metrics.register(PluginCollector(build_scheduler(SchedulerConfig())))
    for name in [family.name for family in metrics.registry.collect()]:
        assert any(name.endswith(f"_{end}") for end in shown), name


def test_the_plugin_of_the_guide_works() -> None:
    source, _ = blocks(ROOT / "docs" / "plugins.md", "python")
    names: dict[str, type] = {}
    exec(source, names)  # noqa: S102 - our own documentation
    services = Services(clock=time.monotonic, rng=random.Random(0))
    plugin = names["Rack"](names["Rack"].Args(prefix="a-"), services)  # type: ignore[attr-defined]
    request = SchedulingRequest(id="r", model="m", prompt_tokens=1, block_size=128, chain=(), prefix=b"")
    scores = plugin.score(request, [Candidate(name="a-1", url=""), Candidate(name="b-1", url="")])
    assert scores.values == [100.0, 0.0]
