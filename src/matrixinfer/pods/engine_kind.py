"""What kind of engine a pod runs, as its own answers say. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

EngineKind: TypeAlias = Literal["vllm", "sglang", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine says about itself, other than its models. None where it does not say."""

    kind: EngineKind
    version: str | None = None
    ranks: int | None = None
    """Data-parallel ranks."""
    architectures: tuple[str, ...] = ()
    """Names of the model's class, such as `LlamaForCausalLM`; SGLang says them."""


def kind_of(owner: str | None) -> EngineKind | None:
    """The kind of engine that names `owner` as the owner of its models; None if that decides nothing."""
    return next((kind for kind in get_args(EngineKind) if kind == owner and kind != "other"), None)
