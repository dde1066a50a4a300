"""The engines of each model, as the search for tokenizers sees them. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from matrixinfer.prompt.remote import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An engine that serves a model."""

    engine: Engine
    name: str
    model: str
    """The engine's own name of the model."""
    roots: Sequence[str]
    """The paths or names from which it loaded the tokenizer or the model, the likeliest first; empty if it does not say."""
    healthy: bool
    identity: object = None
    """What it says about itself, such as its version: a check holds only for an equal one."""


Fleet: TypeAlias = Mapping[str, Sequence[Served]]
"""The engines of each model, by the name that the configuration has for it, or the index."""
