"""The schema of `routes`: which model, and which pods, a request goes to that asks for a name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from matrixinfer.config.base import Section, described
from matrixinfer.errors import ConfigError


class RouteTarget(Section, frozen=True):
    """Where a share of a route's requests goes."""

    model: Annotated[
        str | None, described("The model that they get, by a name that it is served under. Default: the one asked for.")
    ] = None
    weight: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)],
        described("Its share of the requests, in relation to the weights of the other targets. 0 gets none."),
    ] = 1
    pods: Annotated[
        tuple[str, ...],
        described("Names of the pods that may get them; `*` stands for any text. Default: all of the model."),
    ] = ()


class RouteConfig(Section, frozen=True):
    """Requests that ask for some models, or carry some headers, and where they go. The first route that fits counts."""

    name: Annotated[str, described("Unique name, used in metrics and decisions.")]
    targets: Annotated[
        tuple[RouteTarget, ...],
        described(
            "Where they go. Of several targets, those count of which a pod is healthy; a session, or else the request's "
            "`user`, always gets the same one."
        ),
    ]
    models: Annotated[
        tuple[str, ...],
        described("Names that clients ask for; `*` stands for any text. Default: any."),
    ] = ()
    headers: Annotated[
        dict[str, str],
        described("Headers that a request must carry, all of them, with these values; `*` stands for any text."),
    ] = msgspec.field(default_factory=dict)


def check_routes(routes: Sequence[RouteConfig]) -> None:
    """Check what types cannot express. Raises `ConfigError`."""
    seen: dict[str, int] = {}
    for i, route in enumerate(routes):
        where = f"$.routes[{i}]"
        if not re.fullmatch(r"[\w.:/-]{1,100}", route.name):
            raise ConfigError(f"{where}.name", f"expected letters, digits and `._:/-`, got `{route.name}`")
        if route.name in seen:
            raise ConfigError(
                f"{where}.name", f"the name `{route.name}` is already taken by $.routes[{seen[route.name]}]"
            )
        seen[route.name] = i
        if not route.targets:
            raise ConfigError(f"{where}.targets", "expected at least one target")
        if not any(target.weight for target in route.targets):
            raise ConfigError(f"{where}.targets", "expected a target with a weight above 0")
        for j, target in enumerate(route.targets):
            twin = next((k for k in range(j) if _place(route.targets[k]) == _place(target)), None)
            if twin is not None:
                raise ConfigError(
                    f"{where}.targets[{j}]", f"expected another model or other pods than those of [{twin}]"
                )
        if not route.models and not route.headers:
            raise ConfigError(where, "expected `models` or `headers`: a route without either would take every request")
        for name in route.headers:
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'+.^_`|~-]+", name):
                raise ConfigError(f"{where}.headers", f"expected the name of a header, got `{name}`")


def _place(target: RouteTarget) -> tuple[str | None, frozenset[str]]:
    return target.model, frozenset(target.pods)
