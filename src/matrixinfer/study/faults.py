"""What happens to a fleet during a replay, at set times."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from matrixinfer.errors import ConfigError

Kind: TypeAlias = Literal["restart", "join", "leave", "reset", "slow", "small", "forget"]

_TEXT = re.compile(r"(?P<kind>[a-z]+)@(?P<at>\d+(?:\.\d+)?)(?::(?P<pod>\d+)(?::(?P<value>\d+(?:\.\d+)?))?)?")
_DEFAULTS: dict[Kind, float] = {
    "restart": 30.0,
    "join": 0.0,
    "leave": 0.0,
    "reset": 0.0,
    "slow": 3.0,
    "small": 0.5,
    "forget": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One event.

    `restart`: the engine loses its requests and its cache, and is down for `value` seconds. `join` and `leave`: a pod is
    added or taken away. `reset`: the engine clears its cache as soon as it is idle. `slow`: from then on its steps take
    `value` times as long. `small`: the pod has this share of the cache from the start, whatever the time says. `forget`:
    all gateways restart with an empty memory, beside warm engines.
    """

    kind: Kind
    at: float
    """Seconds after the start."""
    pod: int = 0
    value: float

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `KIND@SECONDS[:POD[:VALUE]]`. Raises `ConfigError`."""
        match = _TEXT.fullmatch(text)
        if match is None or match["kind"] not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise ConfigError("--fault", f"expected KIND@SECONDS[:POD[:VALUE]], with one of {kinds}; got `{text}`")
        kind = cast("Kind", match["kind"])
        value = _DEFAULTS[kind] if match["value"] is None else float(match["value"])
        if (kind == "slow" and value <= 0) or (kind == "small" and not 0 < value <= 1):
            raise ConfigError("--fault", f"expected a factor above 0, or a share of at most 1, got `{text}`")
        return cls(kind=kind, at=float(match["at"]), pod=int(match["pod"] or 0), value=value)
