"""Merges the metrics of several processes that work as one. Pure.

Counters and histograms are added up, and what processes that have gone had counted stays in the sum. A gauge is added up
if it counts things that each process has of its own; otherwise all processes look at the same thing, and the largest
value is shown: a flag is 1 as soon as one process sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

SUMMED: Final = frozenset(
    f"matrixinfer_{name}"
    for name in (
        "admission_requests",
        "in_flight",
        "index_bytes",
        "kept_entries",
        "kv_held_frames",
        "kv_ledger_bytes",
        "loop_tasks",
        "read_chats_bytes",
        "redis_waiting_blocks",
        "redis_writer",
        "request_bytes",
        "request_bytes_limit",
        "token_cache_bytes",
    )
)
"""Gauges that are added up."""
LEAST: Final = frozenset({"matrixinfer_config_generation", "matrixinfer_kv_reuse"})
"""Gauges of which the least value is shown."""

Key = tuple[str, tuple[tuple[str, str], ...]]


class Family(NamedTuple):
    """One metric: its kind, its description, and its values by series."""

    kind: str
    text: str
    values: dict[Key, float]


Families = dict[str, Family]


def parsed(text: str) -> Families:
    """The metrics of one process."""
    families: Families = {}
    for each in text_string_to_metric_families(text):
        values = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for sample in each.samples
            if not sample.name.endswith("_created")
        }
        families[each.name] = Family(each.type, each.documentation, values)
    return families


def merged(present: Sequence[Families], gone: Mapping[Key, float] | None = None) -> Families:
    """The metrics of all processes. `gone` is what processes had counted that are not there any more."""
    found: Families = {}
    for families in present:
        for name, family in families.items():
            into = found.setdefault(name, Family(family.kind, family.text, {})).values
            for key, value in family.values.items():
                into[key] = value if key not in into else _both(name, family.kind, into[key], value)
    pods = {value for family in found.values() for key in family.values for name, value in key[1] if name == "pod"}
    for key, value in (gone or {}).items():
        name = key[0].removesuffix("_total").removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        counted = found.get(name)
        if counted is not None and all(value in pods for label, value in key[1] if label == "pod"):
            counted.values[key] = counted.values.get(key, 0.0) + value
    return found


def counted(families: Families) -> Iterator[tuple[Key, float]]:
    """What a process had counted, to be kept when it has gone."""
    for family in families.values():
        if family.kind in ("counter", "histogram", "summary"):
            yield from family.values.items()


def rendered(families: Families) -> bytes:
    """The text that Prometheus reads."""
    lines: list[str] = []
    for name, family in families.items():
        full = f"{name}_total" if family.kind == "counter" else name
        text = family.text.replace("\\", r"\\").replace("\n", r"\n")
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {family.kind}"]
        lines += [f"{sample}{_labels(labels)} {value!r}" for (sample, labels), value in family.values.items()]
    return ("\n".join(lines) + "\n").encode()


def _both(name: str, kind: str, one: float, other: float) -> float:
    if kind in ("counter", "histogram", "summary") or name in SUMMED:
        return one + other
    return min(one, other) if name in LEAST else max(one, other)


def _labels(labels: Sequence[tuple[str, str]]) -> str:
    escaped = (
        f'{name}="{value.replace(chr(92), chr(92) * 2).replace(chr(10), chr(92) + "n").replace(chr(34), chr(92) + chr(34))}"'
        for name, value in labels
    )
    return f"{{{','.join(escaped)}}}" if labels else ""
