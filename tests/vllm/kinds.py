"""Kinds of models: a configuration each, whose random weights vLLM makes by itself (`--load-format dummy`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import Options
from .model import HEADS, HIDDEN, INNER, KV_HEADS, MAX_TOKENS, VOCABULARY, write_tokenizer

WINDOW = 128
"""Tokens of a sliding window, or of a chunk."""
DROPPING = ("0.32.0",)
"""Versions that drop a block of every hit when they draft with EAGLE or MTP."""
_PLUGIN = "prefix_caching_plugin"

_SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model, and how its engine is started."""

    config: Mapping[str, Any]
    arguments: tuple[str, ...] = ()
    """Further arguments of `vllm serve`."""
    speculation: Mapping[str, Any] | None = None
    """`--speculative-config`."""
    draft: Mapping[str, Any] | None = None
    """The configuration of the model that drafts."""
    parser: str = "pythonic"
    """Of tool calls."""
    block_size: int = 32
    blocks: int = 400
    caches_prefixes: bool = True
    """vLLM caches prefixes of this kind on every CPU. Otherwise a plugin makes it do so."""
    renders: bool = True
    """The engine renders chats with the model's template."""
    attention: frozenset[str]
    """The kinds of attention that its events must name."""
    drops_block: bool = False
    """Drops a block of every hit, which no event says, in the versions in `DROPPING`."""
    is_exact: bool = True
    """Otherwise hits may differ from what is predicted, and the feed says so."""


def _config(architecture: str, model_type: str, layers: int, **more: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {"architectures": [architecture], "model_type": model_type, "num_hidden_layers": layers}
    return _SHAPE | shape | more


_LLAMA = _config("LlamaForCausalLM", "llama", 2)
_QWEN = _config("Qwen2ForCausalLM", "qwen2", 2)
_GEMMA = _config(
    "Gemma3ForCausalLM",
    "gemma3_text",
    6,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=32,
    sliding_window=WINDOW,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
)
_GPT_OSS = _config(
    "GptOssForCausalLM",
    "gpt_oss",
    4,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_local_experts=4,
    num_experts_per_tok=2,
    attention_bias=True,
)
_MISTRAL = _config("MistralForCausalLM", "mistral", 2, sliding_window=WINDOW)
_LLAMA4 = _config(
    "Llama4ForCausalLM",
    "llama4_text",
    4,
    attention_chunk_size=WINDOW,
    num_local_experts=2,
    num_experts_per_tok=1,
    intermediate_size_mlp=INNER,
    interleave_moe_layer_step=2,
    no_rope_layers=[1, 1, 1, 0],
)
_DEEPSEEK = _config(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    2,
    num_key_value_heads=HEADS,
    kv_lora_rank=512,
    q_lora_rank=64,
    qk_rope_head_dim=64,
    qk_nope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=2,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=2,
    moe_intermediate_size=INNER,
)
_QWEN_NEXT = _config(
    "Qwen3NextForCausalLM",
    "qwen3_next",
    4,
    num_key_value_heads=2,
    head_dim=256,  # a block of full attention is as large as a state, so a small head makes blocks of many tokens
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    partial_rotary_factor=0.5,
)
_GLM = _config(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    2,
    first_k_dense_replace=1,
    n_routed_experts=2,
    num_experts_per_tok=1,
    n_shared_experts=1,
    moe_intermediate_size=64,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    norm_topk_prob=True,
    attention_bias=True,
    partial_rotary_factor=0.5,
    num_nextn_predict_layers=1,
    tie_word_embeddings=False,
)
_EAGLE = _config("EagleLlamaForCausalLM", "llama", 1)
_FULL = frozenset({"full_attention"})
_MTP = {"method": "mtp", "num_speculative_tokens": 1}

KINDS: dict[str, Kind] = {
    "gemma3": Kind(config=_GEMMA, blocks=1600, attention=_FULL | {"sliding_window"}),
    "gpt-oss": Kind(config=_GPT_OSS, blocks=800, parser="openai", renders=False, attention=_FULL | {"sliding_window"}),
    "qwen3-next": Kind(config=_QWEN_NEXT, arguments=("--mamba-cache-mode", "align"), attention=_FULL | {"mamba"}),
    "deepseek": Kind(
        config=_DEEPSEEK, block_size=16, blocks=800, caches_prefixes=False, attention=frozenset({"mla_attention"})
    ),
    "deepseek-mtp": Kind(
        config=_DEEPSEEK | {"num_nextn_predict_layers": 1},
        speculation=_MTP,
        block_size=16,
        blocks=800,
        caches_prefixes=False,
        attention=frozenset({"mla_attention"}),
        drops_block=True,
    ),
    "glm-mtp": Kind(config=_GLM, speculation=_MTP, attention=_FULL, drops_block=True),
    "llama-eagle": Kind(
        config=_LLAMA,
        speculation={"method": "eagle", "num_speculative_tokens": 2},
        draft=_EAGLE,
        attention=_FULL,
        drops_block=True,
    ),
    "qwen2-ngram": Kind(
        config=_QWEN,
        speculation={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        attention=_FULL,
    ),
    "llama4": Kind(config=_LLAMA4, blocks=1600, attention=_FULL | {"chunked_local_attention"}, is_exact=False),
    "mistral": Kind(config=_MISTRAL, attention=frozenset({"sliding_window"}), is_exact=False),
    "mistral-dense": Kind(
        config=_MISTRAL,
        arguments=("--prefix-cache-retention-interval", "None"),
        attention=frozenset({"sliding_window"}),
    ),
}


def make_kind(folder: Path, kind: Kind) -> Path:
    """Write the model's configuration, its draft's and the tokenizer. vLLM draws the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(kind.config))
    if kind.draft is not None:
        (folder / "draft").mkdir(exist_ok=True)
        (folder / "draft" / "config.json").write_text(json.dumps(kind.draft))
    write_tokenizer(folder)
    return folder


def make_plugin(folder: Path) -> Path:
    """Write the folder that makes vLLM find `prefix_caching_plugin`."""
    about = folder / f"{_PLUGIN}-1.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PLUGIN}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{_PLUGIN} = {_PLUGIN}:register\n")
    shutil.copy(Path(__file__).parent / f"{_PLUGIN}.py", folder)
    return folder


def options_of(kind: Kind, model: Path, plugin: Path) -> Options:
    """How the engine of a kind is started, with the model that `make_kind` wrote."""
    arguments = ["--load-format", "dummy", *kind.arguments]
    if kind.speculation is not None:
        draft = {"model": str(model / "draft")} if kind.draft is not None else {}
        arguments += ["--speculative-config", json.dumps({**kind.speculation, **draft})]
    return Options(
        block_size=kind.block_size,
        blocks=kind.blocks,
        max_tokens=4096,
        parser=kind.parser,
        arguments=tuple(arguments),
        path=None if kind.caches_prefixes else plugin,
    )
