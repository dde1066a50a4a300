from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from matrixinfer.config import Config, parse
from matrixinfer.config.shown import HIDDEN, is_secret, shown


def test_everything_in_effect_is_shown_but_secrets() -> None:
    text = "redis: {password: hush, sentinelPassword: hush, username: me}\nlimits: {maxBodyBytes: 7}"
    settings = shown(parse(text, base=Path()))
    assert settings["redis"]["password"] == settings["redis"]["sentinelPassword"] == HIDDEN
    assert settings["redis"]["username"] == "me"
    assert settings["limits"]["maxBodyBytes"] == 7
    assert settings["drain"]["delaySeconds"] == 3.0
    assert "hush" not in str(settings)


def test_secrets_in_arguments_of_plugins_are_hidden() -> None:
    text = "scheduler: {pluginConfig: [{name: mine, args: {apiKey: hush, nested: {tokens: [hush]}}}]}"
    assert "hush" not in str(shown(parse(text, base=Path())))


def test_what_is_not_set_is_not_called_hidden() -> None:
    assert shown(parse("redis: {}", base=Path()))["redis"]["sentinelPassword"] is None


@pytest.mark.parametrize(
    ("key", "value", "secret"),
    [
        ("password", "x", True),
        ("api_key", "x", True),
        ("apiKeyFile", "/run/key", False),
        ("maxPrefixTokens", 5, False),
        ("salt", "x", True),
        ("tokenizer", "x", False),
    ],
)
def test_secrets_are_known_by_their_names(key: str, value: object, secret: bool) -> None:
    assert is_secret(key, value) is secret


def test_every_key_that_is_never_shown_is_hidden() -> None:
    """The descriptions say so: a new secret must not be forgotten here."""

    def walk(schema: dict[str, Any]) -> list[str]:
        found = []
        for definition in schema["$defs"].values():
            for key, value in definition.get("properties", {}).items():
                if "never shown" in value.get("description", "").lower():
                    found.append(key)
        return found

    keys = walk(msgspec.json.schema(Config))
    assert {"password", "sentinelPassword"} <= set(keys)
    assert [key for key in keys if not is_secret(key, "x")] == []
