"""Which route a request takes: aliases, splits between models or pods, and headers that decide. Pure.

Of a route's targets a request gets one by weighted rendezvous hashing of what it sticks to: when a weight changes, or a
target has no pod for a while, only as many requests move as must.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from matrixinfer.config import RouteConfig, RouteTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The route that a request takes."""

    name: str
    model: str
    """The model that it gets."""
    target: RouteTarget
    total: int
    """The weights of all targets that it could have got."""
    sticks: bool
    """Whether the client's later requests get the same target."""

    def allows(self, pod: str) -> bool:
        """Whether a pod may get the request."""
        return not self.target.pods or any(_matches(pattern, pod) for pattern in self.target.pods)

    @property
    def label(self) -> str:
        """The target, for metrics."""
        return f"{self.target.model or '*'}{'' if not self.target.pods else '@' + ','.join(self.target.pods)}"

    @property
    def note(self) -> str:
        """What a decision says about it."""
        where = f" on {', '.join(self.target.pods)}" if self.target.pods else ""
        share = f", weight {self.target.weight} of {self.total}" if self.total != self.target.weight else ""
        why = "" if self.sticks or not share else ", by chance: neither a session nor a user is named"
        return f"route {self.name}: goes to {self.model}{where}{share}{why}"


class Routes:
    """The configured routes, the first that fits first."""

    def __init__(self, routes: Sequence[RouteConfig]) -> None:
        self.reconfigure(routes)

    def reconfigure(self, routes: Sequence[RouteConfig]) -> None:
        """Requests that come from now on take these."""
        self._routes = [(route, {name.lower(): value for name, value in route.headers.items()}) for route in routes]

    def __bool__(self) -> bool:
        return bool(self._routes)

    def names(self) -> Mapping[str, Sequence[str]]:
        """The names that clients may ask for because of a route without headers, with the models that they may get."""
        found: dict[str, Sequence[str]] = {}
        for route, headers in self._routes:
            for name in () if headers else route.models:
                if "*" not in name:
                    found.setdefault(name, [target.model or name for target in route.targets if target.weight])
        return found

    def choose(
        self,
        asked: str,
        headers: Mapping[str, str],
        *,
        key: str | None,
        otherwise: str,
        is_available: Callable[[Route], bool],
    ) -> Route | None:
        """The route of a request that asks for a model; None if none fits.

        It sticks to `key`, or without one gets a target by `otherwise`. Targets that are not available count only if
        none is.
        """
        for route, wanted in self._routes:
            if _fits(route, wanted, asked, headers):
                return _choose(route, asked, key, otherwise, is_available)
        return None


def _choose(
    route: RouteConfig, asked: str, key: str | None, otherwise: str, is_available: Callable[[Route], bool]
) -> Route:
    weighted = [target for target in route.targets if target.weight]
    made = [_route(route, target, asked, weighted, key) for target in weighted]
    available = [each for each in made if is_available(each)] if len(made) > 1 else made
    if available and len(available) < len(made):
        weighted = [each.target for each in available]
        made = [_route(route, target, asked, weighted, key) for target in weighted]
    stick = otherwise if key is None else key
    return min(made, key=lambda each: -math.log(_uniform(route.name, each.label, stick)) / each.target.weight)


def _route(route: RouteConfig, target: RouteTarget, asked: str, among: Sequence[RouteTarget], key: str | None) -> Route:
    return Route(
        name=route.name,
        model=target.model or asked,
        target=target,
        total=sum(each.weight for each in among),
        sticks=key is not None,
    )


def _fits(route: RouteConfig, wanted: Mapping[str, str], asked: str, headers: Mapping[str, str]) -> bool:
    if route.models and not any(_matches(pattern, asked) for pattern in route.models):
        return False
    return all((given := headers.get(name)) is not None and _matches(value, given) for name, value in wanted.items())


def _matches(pattern: str, text: str) -> bool:
    """Whether the text is what the pattern says, where `*` stands for any text.

    Takes a time proportional to the text, which clients choose; a regular expression would try every way to split it.
    """
    if "*" not in pattern:
        return pattern == text
    first, *middle, last = pattern.split("*")
    position, end = len(first), len(text) - len(last)
    if position > end or not text.startswith(first) or not text.endswith(last):
        return False
    for part in middle:
        found = text.find(part, position, end)
        if found < 0:
            return False
        position = found + len(part)
    return True


def _uniform(*parts: str) -> float:
    """A number above 0 and at most 1 that depends on the parts only, and evenly."""
    digest = blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 1) / 2**64
