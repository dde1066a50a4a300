"""What kind of engine a pod runs, as its own answers say. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

EngineKind: TypeAlias = Literal["vllm", "sglang", "other"]

_HYBRIDS = (
    *(
        "Llama4",
        "GptOss",
        "Gemma4",
        "Step3p5",
        "Step3p7",
        "MiMoV2",
        "DeepseekV4",
        "GraniteSWA",
        "GraniteMoeSWA",
        "Laguna",
    ),
    *(
        "Qwen3Next",
        "Qwen3_5",
        "FalconH1",
        "NemotronH",
        "KimiLinear",
        "Lfm2",
        "JetNemotron",
        "GraniteMoeHybrid",
        "BailingMoeV2_5",
    ),
    *("Mamba", "FalconMamba"),
)
"""How the names of models begin of which SGLang 0.5.23 keeps sliding windows, or states of mamba or linear attention,
apart from the pages that it publishes."""


_BY_OWNER: Mapping[str | None, EngineKind] = {"vllm": "vllm", "sglang": "sglang"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine says about itself, other than its models. None where it does not say."""

    kind: EngineKind
    version: str | None = None
    ranks: int | None = None
    """Data-parallel ranks."""
    architectures: tuple[str, ...] = ()
    """Names of the model's class, such as `LlamaForCausalLM`; SGLang says them."""
    roots: tuple[str, ...] = ()
    """Where SGLang loaded the tokenizer and the model from: paths, or names of repositories."""

    @property
    def hides_components(self) -> bool:
        """Whether what the engine reuses depends on more than it publishes."""
        return self.kind == "sglang" and any(name.startswith(_HYBRIDS) for name in self.architectures)


def kind_of(owner: str | None) -> EngineKind | None:
    """The kind of engine that names `owner` as the owner of its models; None if that decides nothing."""
    return _BY_OWNER.get(owner)
