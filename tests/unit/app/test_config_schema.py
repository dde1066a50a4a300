"""The schema for editors accepts what the gateway accepts, and refuses unknown keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from matrixinfer.app.config_schema import config_schema
from matrixinfer.scheduler.plugin_loader import discover

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = config_schema(discover())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def complaints(validator: Any, text: str) -> list[str]:
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_of_the_documentation_is_accepted(validator: Any, page: Path) -> None:
    for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL):
        assert complaints(validator, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "pod: []",
        "pods: [{name: a, url: 'http://a', weight: 1}]",
        "pods: [{name: a}]",
        "limits: {maxBodyBytes: 0}",
        "limits: {maxBodyBytes: many}",
        "index: {kind: mongodb}",
        "discovery: {dns: [{name: x, port: 70000}]}",
        "scheduler: {plugins: {Filter: {enabled: [{weight: 1}]}}}",
        "scheduler: {pluginConfig: [{name: bounded-load, args: {maxInFlight: 1}}]}",
        "scheduler: {pluginConfig: [{name: bounded-load, args: {factor: 0}}]}",
    ],
)
def test_what_the_gateway_refuses_is_refused(validator: Any, text: str) -> None:
    assert complaints(validator, text)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "scheduler: {plugins: {Filter: {enabled: [bounded-load, {name: least-request, weight: 2}]}}}",
        "scheduler: {pluginConfig: [{name: kvcache-aware, args: {blockSizeToHash: 64, hashScheme: block}}]}",
        "scheduler: {pluginConfig: [{name: of-another-package, args: {anything: 1}}]}",
        "admin: null",
    ],
)
def test_what_the_gateway_accepts_is_accepted(validator: Any, text: str) -> None:
    assert complaints(validator, text) == []


def test_every_key_has_a_description(validator: Any) -> None:
    for name, definition in validator.schema["$defs"].items():
        for key, value in definition.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key}"
