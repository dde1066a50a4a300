"""A fitted engine as a preset, in YAML. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
import yaml

from matrixinfer.study.calibration.fit import Fit
from matrixinfer.study.presets import Preset


def preset_of(
    fit: Fit,
    *,
    model: str,
    url: str,
    when: str,
    block_size: int,
    kv_tokens: int,
    max_tokens: int,
    max_sequences: int,
    notes: Mapping[str, str],
) -> Preset:
    """The preset of a measured engine. `notes` says where numbers come from that were not measured."""
    measured = f"measured at {url} on {when}"
    return Preset(
        summary=f"{model}, {measured}; half of the measurements within {fit.typical_error:.0%}, all within {fit.worst_error:.0%}",
        block_size=block_size,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        kv_tokens=kv_tokens,
        timing=fit.times,
        source={
            "block_size": f"{url}/metrics",
            "kv_tokens": f"{url}/metrics",
            **dict.fromkeys(msgspec.structs.asdict(fit.times), measured),
            **notes,
        },
    )


def yaml_of(preset: Preset, *, model: str) -> str:
    """A file for `matrixinfer replay --engine FILE`."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-") or "engine"
    return yaml.safe_dump({name: msgspec.to_builtins(preset)}, sort_keys=False, allow_unicode=True, width=120)
