"""The alert rules and the Grafana dashboard ask for metrics that a running gateway has, by labels that they have."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Set
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.tasks import cancel_and_wait
from tests.ports import free_port
from tests.waiting import eventually

from .fleet import Fleet, fleet

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
GRAFANA = ROOT / "deploy" / "grafana" / "matrixinfer-gateway.json"
ENGINE = SimEngineConfig(model="m", block_size=16, num_blocks=5_000)
REDIS_ONLY = {"matrixinfer_redis_circuit"}
"""Metrics that only a gateway with Redis has; the page on operations documents their labels."""
_SUFFIXES = ("_bucket", "_sum", "_count")


class Query(NamedTuple):
    """One query, and where it stands."""

    place: str
    text: str


def queries() -> Iterator[Query]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield Query(rule["alert"], rule["expr"])
    for panel in json.loads(GRAFANA.read_text())["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "1m").replace("$pod", ".*")
            yield Query(f"{panel['title']} {target['refId']}", text)


QUERIES = list(queries())


def selectors(text: str) -> Iterator[tuple[str, Set[str]]]:
    """The metrics that a query names, each with the labels that it selects by."""
    for name, braces in re.findall(r"(matrixinfer_\w+)(?:\{([^}]*)\})?", text):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces or ""))


def grouped(text: str) -> Set[str]:
    """The labels that a query groups by."""
    return {label.strip() for found in re.findall(r"\bby\s*\(([^)]*)\)", text) for label in found.split(",")}


def documented() -> Mapping[str, Set[str]]:
    """The labels that the metric tables of the documentation give: those of metrics that have no series yet."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"`(matrixinfer_\w+)\{([\w,]+)\}", (ROOT / "docs" / "operations.md").read_text()):
        found.setdefault(name, set()).update(labels.split(","))
    return found


async def metrics(gateway: Fleet) -> tuple[Set[str], Mapping[str, Set[str]]]:
    """Every metric of the gateway, and the labels of those that have series."""
    async with gateway.session.get(f"{gateway.url}/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    names: set[str] = set()
    labels: dict[str, set[str]] = {}
    for family in families:
        names.add(f"{family.name}_total" if family.type == "counter" else family.name)
        names |= {family.name + suffix for suffix in _SUFFIXES if family.type == "histogram"}
        for sample in family.samples:
            names.add(sample.name)
            labels.setdefault(sample.name, set()).update(sample.labels)
    return names, labels


@asynccontextmanager
async def used(tokenizer: LocalTokenizer) -> AsyncIterator[Fleet]:
    """A gateway that has seen requests, hits, and a model that nobody serves."""
    async with fleet(tokenizer, ENGINE, pods=2) as gateway:
        await gateway.settled()
        for number in range(6):
            body = {"model": "m", "prompt": [number % 2] * 400, "max_tokens": 1}
            await gateway.post("/v1/completions", body)
            await gateway.settled()
        async with gateway.session.post(f"{gateway.url}/v1/completions", json={"model": "none", "prompt": "x"}) as got:
            assert got.status == 404
        yield gateway


async def test_every_query_asks_for_metrics_and_labels_that_exist(tokenizer: LocalTokenizer) -> None:
    async with used(tokenizer) as gateway:
        names, live = await metrics(gateway)
    known = documented()
    assert len(QUERIES) > 30
    for query in QUERIES:
        asked: set[str] = set()
        for name, labels in selectors(query.text):
            assert name in names or name in REDIS_ONLY, f"{query.place}: there is no metric {name}"
            has = live.get(name) or known.get(name, set())
            assert labels <= has | {"le"}, f"{query.place}: {name} has the labels {sorted(has)}"
            asked |= has
        assert grouped(query.text) <= asked, f"{query.place}: groups by what its metrics do not have"


def test_every_alert_says_what_happens_and_where_to_read_on() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        page, _, heading = rule["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
        assert not heading or heading in anchors, rule["alert"]
        used_labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert used_labels <= grouped(rule["expr"]), rule["alert"]


def test_no_panel_covers_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(GRAFANA.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: install Debian's package `prometheus`")
def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@asynccontextmanager
async def prometheus(gateway: Fleet, folder: Path) -> AsyncIterator[str]:
    """A real Prometheus that scrapes the gateway every second and evaluates the rules; its base URL."""
    target = gateway.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "gateway", "static_configs": [{"targets": [target]}]}],
    }
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield url
    finally:
        process.kill()
        await process.wait()


async def asked(session: aiohttp.ClientSession, url: str, query: str) -> Any:
    async with session.get(f"{url}/api/v1/query", params={"query": query}) as response:
        answer = await response.json()
        assert (response.status, answer["status"]) == (200, "success"), (query, answer)
        return answer["data"]["result"]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus: install Debian's package `prometheus`")
async def test_a_real_prometheus_answers_every_query(tokenizer: LocalTokenizer, tmp_path: Path) -> None:
    async with used(tokenizer) as gateway, prometheus(gateway, tmp_path) as url:

        async def requests() -> None:
            while True:
                body = {"model": "m", "prompt": [1] * 400, "max_tokens": 1}
                await gateway.post("/v1/completions", body)
                await asyncio.sleep(0.2)

        async def has_rates() -> bool:
            try:
                return bool(await asked(gateway.session, url, "sum(rate(matrixinfer_routed_total[1m])) > 0"))
            except (aiohttp.ClientError, AssertionError):
                return False  # it is still starting

        traffic = asyncio.create_task(requests())
        try:
            await eventually(has_rates, pause=0.5)
            answers = {query.place: await asked(gateway.session, url, query.text) for query in QUERIES}
        finally:
            await cancel_and_wait(traffic)
    for place in ("Hit rate A", "Trust A", "Requests A", "Time to first byte C", "Requests by pod A", "Memory A"):
        assert answers[place], place
    firing = {query.place for query in QUERIES if query.place.startswith("Gateway") and answers[query.place]}
    assert firing <= {"GatewayPauses"}, "alerts fire on a gateway that is well"  # a busy machine may give it no time
