"""What a search has found, as JSON and as a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import yaml

from matrixinfer import __version__
from matrixinfer.config import SchedulerConfig
from matrixinfer.study.tuning.confidence import Difference
from matrixinfer.study.tuning.search import Found, Tried


def sentence(found: Found, goal: str) -> str:
    """What to do, in a sentence."""
    best = found.best
    if best is None:
        seeds = max((each.seeds for _, each in found.finalists), default=0)
        return (
            f"Keep the default profile, {found.default.setting.name}: no other setting was shown to have a better {goal} "
            f"on {seeds} seeds."
        )
    tried, gain = best
    return (
        f"Use {tried.setting.name}: {goal} is better by {-gain.mean:.1%} than with the default, {found.default.setting.name}; "
        f"with 95 % confidence by {-gain.high:.1%} to {-gain.low:.1%}, on {gain.seeds} seeds."
    )


def document(found: Found, *, goal: str, traces: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """As JSON-able data."""
    chosen = _chosen(found)
    return {
        "version": __version__,
        "goal": goal,
        "traces": traces,
        "default": _tried(found.default, goal),
        "finalists": [{**_tried(each, goal), **_difference(gain)} for each, gain in found.finalists],
        "best": None if found.best is None else {**_tried(found.best[0], goal), **_difference(found.best[1])},
        "tried": [_tried(each, goal) for each in found.tried],
        "is_complete": found.is_complete,
        "advice": sentence(found, goal),
        "scheduler": section(chosen.setting.config),
    }


def configuration(found: Found, *, goal: str, traces: Sequence[str]) -> str:
    """A config file that `serve` accepts: the best setting, or the default where none was shown to be better."""
    head = [
        f"# Written by matrixinfer tune {__version__}, from {', '.join(traces)}.",
        f"# {sentence(found, goal)}",
        "# The engine was a model: compare with your own figures after the change.",
    ]
    if not found.is_complete:
        head.append("# The time did not suffice for the whole search: give it more --minutes.")
    body = yaml.safe_dump({"scheduler": section(_chosen(found).setting.config)}, sort_keys=False)
    return "\n".join(head).replace("\r", "") + "\n" + body


def section(config: SchedulerConfig) -> dict[str, object]:
    """The profile and the arguments of its plugins, as in a config file."""
    enabled = {ref.name for stage in msgspec.structs.asdict(config.plugins).values() for ref in stage.enabled}
    return {
        "plugins": msgspec.to_builtins(config.plugins),
        "pluginConfig": [msgspec.to_builtins(entry) for entry in config.plugin_config if entry.name in enabled],
    }


def _chosen(found: Found) -> Tried:
    return found.default if found.best is None else found.best[0]


def value_of(tried: Tried, goal: str) -> float | None:
    """The mean over the fresh seeds, else what the search saw; in the goal's own sense."""
    values = [value for seed, value in tried.values.items() if seed] or list(tried.values.values())
    if not values or math.inf in values:
        return None
    mean = sum(values) / len(values)
    return float(f"{1 - mean if goal == 'hit_rate' else mean:.5g}")


def _tried(tried: Tried, goal: str) -> dict[str, object]:
    return {
        "name": tried.setting.name,
        "profile": tried.setting.profile,
        "changes": dict(tried.setting.changes),
        goal: value_of(tried, goal),
    }


def _difference(gain: Difference) -> dict[str, object]:
    return {
        "seeds": gain.seeds,
        "difference": _rounded(gain.mean),
        "low": _rounded(gain.low),
        "high": _rounded(gain.high),
        "verdict": gain.verdict,
    }


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
