from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from matrixinfer.config import Config, parse
from matrixinfer.config.difference import changed_keys
from matrixinfer.config.reload import RELOADABLE, needs_restart

BASE = """
pods:
  - {name: a, url: "http://a:1"}
  - {name: b, url: "http://b:1"}
redis: {host: r, password: first}
"""


def config(text: str = "") -> Config:
    return parse(text or BASE, base=Path())


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ("a:1", "a:2", ["pods[a].url"]),
        ("name: b", "name: c", ["pods[b]", "pods[c]"]),
        ("first", "second", ["redis.password"]),
        ("redis:", "limits: {maxBodyBytes: 7}\nredis:", ["limits.maxBodyBytes"]),
        ("redis: {host: r, password: first}", "", ["redis"]),
        ("redis:", "scheduler: {weights: {host: 0.1}}\nredis:", ["scheduler.weights.host"]),
        (
            "redis:",
            "scheduler: {plugins: {Picker: {enabled: [random]}}}\nredis:",
            ["scheduler.plugins.Picker.enabled[max-score]", "scheduler.plugins.Picker.enabled[random]"],
        ),
        ("redis:", "discovery: {files: [{path: x}]}\nredis:", ["discovery.files"]),
    ],
)
def test_the_keys_that_differ_are_named_and_no_value_is(old: str, new: str, keys: list[str]) -> None:
    assert changed_keys(config(), config(BASE.replace(old, new))) == keys


def test_pods_in_another_order_differ() -> None:
    first, second = config().pods
    assert changed_keys(config(), msgspec.structs.replace(config(), pods=(second, first))) == ["pods"]


def test_nothing_differs_from_itself() -> None:
    assert changed_keys(config(), config()) == []


def test_what_needs_a_restart() -> None:
    assert [
        key for key in ("listen", "models", "scheduler.seed", "redis.password", "podsX") if not needs_restart(key)
    ] == []
    assert [
        key for key in ("pods[a].url", "pods", "limits.maxBodyBytes", "scheduler.weights.host") if needs_restart(key)
    ] == []


def test_every_reloadable_key_exists() -> None:
    names = {field.encode_name for field in msgspec.structs.fields(Config)}
    assert {key.split(".")[0] for key in RELOADABLE} <= names
