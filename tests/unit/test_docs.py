"""What the documentation shows is what the code does."""

from __future__ import annotations

import argparse
import importlib
import io
import random
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from matrixinfer.app.access_log import AccessLogCollector
from matrixinfer.app.collectors import (
    FeedCollector,
    IndexCollector,
    KeptCollector,
    LogCollector,
    MemoryCollector,
    PluginCollector,
    PodCollector,
    TokenCacheCollector,
    TokenSourceCollector,
)
from matrixinfer.app.config_reference import configuration_page
from matrixinfer.app.fleet_setup import DiscoveryCollector
from matrixinfer.app.ladder_collector import LadderCollector
from matrixinfer.app.reload import ReloadCollector
from matrixinfer.app.router_setup import build_scheduler
from matrixinfer.app.tracing_setup import SpanCollector
from matrixinfer.app.workers.collector import WorkerCollector
from matrixinfer.cli import COMMANDS, main
from matrixinfer.cli.demo import Summary, print_comparison
from matrixinfer.config import (
    AccessLogConfig,
    PodWatchConfig,
    SchedulerConfig,
    TokenizationConfig,
    TracingConfig,
    parse,
)
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.memory import Memory
from matrixinfer.scheduler.framework import Candidate, SchedulingRequest, Services
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.policies import POLICIES, with_policy
from matrixinfer.telemetry.access_log import AccessLog
from matrixinfer.telemetry.log import LogStream
from matrixinfer.telemetry.loop_watch import LoopWatch
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.tracing import SpanExport
from matrixinfer.traffic.ladder.record import LadderLog

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDE = ("configuration.md",)
"""Pages that are not wrapped at 100 characters. The first is generated."""


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


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked), target


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([a-z]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in PAGES[1:]}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `matrixinfer` command that a page shows, without pipes, comments and where its output goes."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    for line in lines:
        command = re.search(r"(?:^|\| )matrixinfer (.*?)(?: >>? \S+)?(?: 2>&1)?(?: &)?$", line)
        if command is not None:
            yield [word for word in shlex.split(command[1], comments=True) if word != "&"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_is_accepted(page: Path) -> None:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    for command in COMMANDS:
        importlib.import_module(f"matrixinfer.cli.{command}").add_parser(subparsers)
    for words in commands(page):
        parser.parse_args(words)  # exits where it does not accept them


def test_the_readme_shows_the_demo_as_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = (text for text in blocks(ROOT / "README.md", "text") if "ttft_ratio" in text)
    said = re.search(r"The same (\d+) requests to (\d+) engines", shown)
    assert said is not None
    summaries = {}
    for row in re.findall(r"^ (\w+) +([\d.]+)% +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+)x", shown, flags=re.MULTILINE):
        rate, mean, median, slowest, ratio = (float(value.replace(",", "")) for value in row[1:])
        summaries[row[0]] = Summary(
            hit_rate=rate / 100,
            ttft_mean_ms=mean,
            ttft_p50_ms=median,
            ttft_p99_ms=slowest,
            ttft_ratio=ratio,
            requests=int(said[1]),
            errors=0,
            pods={},
        )
    print_comparison(summaries, engines=int(said[2]))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()


def test_the_readme_lists_every_command() -> None:
    (table,) = re.findall(r"\| command \|.*?\n\n", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert set(re.findall(r"^\| `matrixinfer ([a-z]+)", table, flags=re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_that_is_shown_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
    assert set(shown) <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WIDE], ids=lambda page: page.name)
def test_prose_is_wrapped(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 100 and not line.startswith("|") and " " in line] == []


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_shipped_profile_is_built_and_bounds_load(policy: str) -> None:
    assert {"bounded-load", "expected-ttft"} & {plugin.name for plugin in POLICIES[policy].filter.enabled}
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


def test_operators_find_every_metric_and_no_other() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    metrics = Metrics()
    metrics.register(IndexCollector(MemoryIndex()))
    metrics.register(FeedCollector({}, lambda _: False, lambda _: 1.0))
    metrics.register(PodCollector(PodRegistry((), (), PodWatchConfig(), clock=lambda: 0.0), {}))
    metrics.register(KeptCollector({}))
    metrics.register(MemoryCollector(Memory(1)))
    metrics.register(LogCollector(LogStream(sys.stderr)))
    metrics.register(AccessLogCollector(AccessLog(AccessLogConfig(path="-"))))
    metrics.register(SpanCollector(SpanExport(TracingConfig(), "1")))
    metrics.register(TokenCacheCollector(TokenizerManager((), TokenizationConfig(), None)))
    metrics.register(TokenSourceCollector(dict))
    metrics.register(PluginCollector(lambda: build_scheduler(SchedulerConfig())))
    metrics.register(LadderCollector(LadderLog(time.monotonic)))
    metrics.register(LoopWatch(time.monotonic))
    metrics.register(DiscoveryCollector())
    metrics.register(ReloadCollector(None))
    metrics.register(WorkerCollector([]))
    names = {family.name.removeprefix("matrixinfer_") for family in metrics.registry.collect()}
    for collector in ("peers_collector.py", "redis_collector.py"):  # what they collect from needs a server
        source = (ROOT / "src" / "matrixinfer" / "app" / collector).read_text()
        names |= set(re.findall(r'"matrixinfer_([a-z_]+)"', source))
    shown = re.findall(r"`(?:matrixinfer|…)_([a-z_]*[a-z])[`{]", page[page.index("## Metrics") : page.index("## Logs")])
    assert {name.removesuffix("_total") for name in shown} == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_metric_that_is_shown_exists(page: Path) -> None:
    source = "".join(file.read_text() for file in (ROOT / "src" / "matrixinfer").rglob("*.py"))
    for name in re.findall(r"`(?:rate\()?matrixinfer_([a-z_]*[a-z])\b(?!_…)", page.read_text()):
        plain = name.removesuffix("_total")
        assert f'"{plain}"' in source or f'"matrixinfer_{plain}"' in source, name


def test_operators_find_every_log_event_and_no_other() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    logs = page[page.index("## Logs") : page.index("## When a part fails")]
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", logs, flags=re.MULTILINE)
    shown = [event for row in rows for event in re.findall(r"[a-z_]+", row)]
    source = "".join(file.read_text() for file in (ROOT / "src" / "matrixinfer").rglob("*.py"))
    logged = r'(?:log|get_logger\(__name__\))\.(?:debug|info|warning|error|exception)\(\s*"([a-z_]+)"'
    assert sorted(shown) == sorted(set(re.findall(logged, source)))


def test_the_plugin_of_the_guide_works() -> None:
    source, _ = blocks(ROOT / "docs" / "plugins.md", "python")
    names: dict[str, type] = {}
    exec(source, names)  # noqa: S102 - our own documentation
    services = Services(clock=time.monotonic, rng=random.Random(0))
    plugin = names["Rack"](names["Rack"].Args(prefix="a-"), services)  # type: ignore[attr-defined]
    request = SchedulingRequest(id="r", model="m", prompt_tokens=1, block_size=128, chain=(), prefix=b"")
    scores = plugin.score(request, [Candidate(name="a-1", url=""), Candidate(name="b-1", url="")])
    assert scores.values == [100.0, 0.0]
