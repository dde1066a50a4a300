from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from matrixinfer.config import ENGINE_PATHS, Config, parse
from matrixinfer.config.api import OWN_PATHS
from matrixinfer.errors import ConfigError
from matrixinfer.gateway.models import PATH
from matrixinfer.prompt.requests import READERS


def api(**settings: Any) -> Config:
    return parse(yaml.safe_dump({"api": settings}), base=Path("/"))


def test_by_default_every_known_path_is_passed_on_and_nothing_is_said_to_browsers() -> None:
    config = api().api
    assert config.paths == tuple(ENGINE_PATHS)
    assert (config.cors, config.sse_keep_alive_seconds) == (None, None)


def test_the_gateways_own_paths_are_the_ones_that_it_serves() -> None:
    assert set(READERS) | {PATH, f"{PATH}/", "/health", "/ready", "/metrics", "/openapi.json"} == OWN_PATHS
    assert not OWN_PATHS & set(ENGINE_PATHS)


@pytest.mark.parametrize("path", ["tokenize", "/a b", "/a/../b", "", "/", "//a", "/a?b", "/%2e"])
def test_a_path_must_be_one(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        api(paths=["/tokenize", path])
    assert caught.value.path == "$.api.paths[1]"


@pytest.mark.parametrize(("paths", "says"), [(["/score"], "itself"), (["/a", "/a"], "twice")])
def test_a_path_is_listed_once_and_is_not_the_gateways_own(paths: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        api(paths=paths)


@pytest.mark.parametrize(
    ("cors", "path"),
    [
        ({"origins": ["chat.example.com"]}, "$.api.cors.origins[0]"),
        ({"origins": ["https://chat.example.com/"]}, "$.api.cors.origins[0]"),
        ({"origins": ["https://*.example.com"]}, "$.api.cors.origins[0]"),
        ({"origins": ["*"], "credentials": True}, "$.api.cors.credentials"),
        ({"origins": [], "headers": ["a b"]}, "$.api.cors.headers[0]"),
        ({"origins": [], "exposeHeaders": ["x-ok", "a:b"]}, "$.api.cors.exposeHeaders[1]"),
    ],
)
def test_a_wrong_setting_for_browsers_fails_with_its_path(cors: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        api(cors=cors)
    assert caught.value.path == path
