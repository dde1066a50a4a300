"""Which route a request takes, and which of its targets."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.config import RouteConfig, RouteTarget
from matrixinfer.routing.routes import Route, Routes

SPLIT = RouteConfig(
    name="split",
    models=("m",),
    targets=(
        RouteTarget(model="old", weight=90),
        RouteTarget(model="new", weight=10),
        RouteTarget(model="off", weight=0),
    ),
)


def chosen(
    routes: list[RouteConfig],
    asked: str = "m",
    *,
    headers: dict[str, str] | None = None,
    key: str | None = "k",
    otherwise: str = "r",
    down: tuple[str, ...] = (),
) -> Route | None:
    return Routes(routes).choose(
        asked,
        headers or {},
        key=key,
        otherwise=otherwise,
        is_available=lambda route: route.model not in down,
    )


def model_of(*arguments: Any, **more: Any) -> str | None:
    route = chosen(*arguments, **more)
    return None if route is None else route.model


def test_the_first_route_that_fits_counts() -> None:
    blue = RouteConfig(name="blue", headers={"X-Team": "blue*"}, targets=(RouteTarget(model="blue"),))
    alias = RouteConfig(name="alias", models=("gpt-*", "m"), targets=(RouteTarget(model="own"),))
    routes = [blue, alias]
    assert model_of(routes, "gpt-4o") == "own"
    assert model_of(routes, "xgpt-4o") is None
    assert model_of(routes, "m.") is None
    assert model_of(routes, "gpt-4o", headers={"x-team": "blue-1"}) == "blue"
    assert model_of(routes, "other", headers={"x-team": "red"}) is None


def test_all_headers_and_the_model_must_fit() -> None:
    both = RouteConfig(name="b", models=("m",), headers={"a": "1", "b": "*"}, targets=(RouteTarget(model="t"),))
    assert model_of([both], headers={"a": "1", "b": ""}) == "t"
    assert model_of([both], headers={"a": "1"}) is None
    assert model_of([both], "n", headers={"a": "1", "b": "2"}) is None


def test_a_target_without_a_model_keeps_the_one_asked_for() -> None:
    canary = RouteConfig(name="c", models=("m",), targets=(RouteTarget(pods=("new-*", "one")),))
    route = chosen([canary])
    assert route is not None
    assert route.model == "m"
    assert [route.allows(name) for name in ("new-1", "one", "old-1", "one-more")] == [True, True, False, False]
    assert route.note == "route c: goes to m on new-*, one"


def test_requests_are_split_by_weight_and_stick_to_their_session() -> None:
    got = Counter(model_of([SPLIT], key=f"session-{i}") for i in range(5000))
    assert 0.08 < got["new"] / 5000 < 0.12
    assert set(got) == {"old", "new"}
    assert {model_of([SPLIT], key="s", otherwise=str(i)) for i in range(50)} == {model_of([SPLIT], key="s")}


def test_requests_without_a_session_are_split_one_by_one() -> None:
    got = Counter(model_of([SPLIT], key=None, otherwise=f"request-{i}") for i in range(5000))
    assert 0.08 < got["new"] / 5000 < 0.12
    route = chosen([SPLIT], key=None)
    assert route is not None
    assert route.note.endswith(", weight 90 of 100, by chance: neither a session nor a user is named")


@given(st.text(), st.integers(0, 100), st.integers(0, 100))
def test_only_as_many_sessions_move_as_the_weights_say(key: str, before: int, after: int) -> None:
    def split(weight: int) -> str | None:
        targets = (RouteTarget(model="old", weight=100), RouteTarget(model="new", weight=weight))
        return model_of([RouteConfig(name="s", models=("m",), targets=targets)], key=key)

    if before <= after and split(before) == "new":
        assert split(after) == "new"


def test_a_target_without_a_pod_gives_its_share_to_the_others() -> None:
    assert {model_of([SPLIT], key=f"{i}", down=("old",)) for i in range(50)} == {"new"}
    stays = [i for i in range(300) if model_of([SPLIT], key=f"{i}") == "old"]
    assert all(model_of([SPLIT], key=f"{i}", down=("new",)) == "old" for i in stays)
    assert model_of([SPLIT], down=("old", "new")) in ("old", "new")


def test_names_are_those_that_a_client_can_ask_for_as_they_are() -> None:
    routes = Routes(
        [
            SPLIT,
            RouteConfig(name="w", models=("gpt-*",), targets=(RouteTarget(model="own"),)),
            RouteConfig(name="h", models=("secret",), headers={"a": "1"}, targets=(RouteTarget(model="own"),)),
        ]
    )
    assert routes.names() == {"m": ["old", "new"]}


@pytest.mark.parametrize("header", ["x-team", "X-TEAM"])
def test_names_of_headers_have_no_case(header: str) -> None:
    route = RouteConfig(name="r", headers={header: "a"}, targets=(RouteTarget(model="t"),))
    assert model_of([route], headers={"x-team": "a"}) == "t"


@given(st.text("ab*", max_size=8), st.text("ab\n", max_size=12))
def test_a_star_stands_for_any_text(pattern: str, text: str) -> None:
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None
    route = RouteConfig(name="r", headers={"x": pattern}, targets=(RouteTarget(model="n"),))
    assert (chosen([route], headers={"x": text}) is not None) is expected


def test_no_header_of_a_client_makes_a_pattern_slow() -> None:
    route = RouteConfig(name="r", headers={"x": "*a" * 20 + "b"}, targets=(RouteTarget(model="n"),))
    assert chosen([route], headers={"x": "a" * 8000}) is None
