from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from matrixinfer.config import Config, RouteTarget, parse
from matrixinfer.errors import ConfigError

TARGET = {"model": "t"}


def routes(*given: dict[str, Any]) -> Config:
    return parse(yaml.safe_dump({"routes": list(given)}), base=Path("/"))


def test_a_route_is_read() -> None:
    (route,) = routes({"name": "r", "models": ["m"], "targets": [{"pods": ["a"]}]}).routes
    assert route.targets == (RouteTarget(pods=("a",)),)


@pytest.mark.parametrize(
    ("route", "path"),
    [
        ({"name": "a b", "models": ["m"], "targets": [TARGET]}, "$.routes[0].name"),
        ({"name": "r", "models": ["m"], "targets": []}, "$.routes[0].targets"),
        ({"name": "r", "models": ["m"], "targets": [{"weight": 0}]}, "$.routes[0].targets"),
        ({"name": "r", "models": ["m"], "targets": [{"weight": -1}]}, "$.routes[0].targets[0].weight"),
        ({"name": "r", "models": ["m"], "targets": [TARGET, TARGET]}, "$.routes[0].targets[1]"),
        ({"name": "r", "targets": [TARGET]}, "$.routes[0]"),
        ({"name": "r", "headers": {"a b": "c"}, "targets": [TARGET]}, "$.routes[0].headers"),
        ({"name": "r", "headers": {"a": 1}, "targets": [TARGET]}, "$.routes[0].headers"),
    ],
)
def test_a_wrong_route_fails_with_its_path(route: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        routes(route)
    assert caught.value.path.startswith(path)


def test_names_are_unique() -> None:
    with pytest.raises(ConfigError, match=r"already taken by \$.routes\[0\]"):
        routes(*[{"name": "r", "models": ["m"], "targets": [TARGET]}] * 2)
