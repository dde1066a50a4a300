"""Named engines, from `presets.yaml`, where each number names its public source."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec
import yaml

from matrixinfer.errors import ConfigError
from matrixinfer.sim.model import Timing
from matrixinfer.study.engine import EngineShape


class Times(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The terms of a step's duration; see `sim.model.Timing`."""

    step: float
    prefill_token: float
    decode_sequence: float
    attention_pair: float
    decode_context: float


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine."""

    summary: str
    block_size: int
    max_tokens: int
    max_sequences: int
    kv_tokens: int
    """Tokens that its KV cache holds."""
    timing: Times
    source: dict[str, str]
    """Where each number comes from."""

    def shape(self, block_size: int) -> EngineShape:
        """The engine with the blocks of a trace."""
        times = self.timing
        timing = Timing(
            step=times.step,
            prefill_token=times.prefill_token,
            decode_sequence=times.decode_sequence,
            attention_pair=times.attention_pair,
            decode_context=times.decode_context,
        )
        return EngineShape(
            block_size=block_size, timing=timing, max_tokens=self.max_tokens, max_sequences=self.max_sequences
        )


DEFAULT = "llama-70b-4xh100"


def presets() -> dict[str, Preset]:
    """All presets by name."""
    text = files("matrixinfer.study").joinpath("presets.yaml").read_text(encoding="utf-8")
    return msgspec.convert(yaml.safe_load(text), dict[str, Preset])


def preset(name: str) -> Preset:
    """The preset of a name, or the one in a YAML file. Raises `ConfigError`."""
    known = presets()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return _read(path)
    raise ConfigError(
        "--engine", f"unknown engine `{name}`; there are: {', '.join(sorted(known))}, or name a YAML file"
    )


def _read(path: Path) -> Preset:
    try:
        found = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), dict[str, Preset])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError("--engine", f"cannot read a preset from {path}: {error}") from error
    if len(found) != 1:
        raise ConfigError("--engine", f"expected one preset in {path}, found {len(found)}")
    (only,) = found.values()
    try:
        only.shape(only.block_size)
    except ValueError as error:
        raise ConfigError("--engine", f"{path}: {error}") from error
    return only
