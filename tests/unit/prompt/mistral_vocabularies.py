"""Mistral vocabularies of several versions, built from those in the wheel of mistral-common."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mistral_common
from mistral_common.tokens.tokenizers.base import SpecialTokens

_DATA = Path(mistral_common.__file__).parent / "data"

_CARRIED = {
    "spm-v3": ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3"),
    "spm-v7": ("mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model.v7"),
    "tekken-v3": ("tekken_240911.json", "tekken.json"),
}
_VERSIONS = {"tekken-v11": "v11", "tekken-v15": "v15"}

NAMES = (*_CARRIED, *_VERSIONS)


def vocabulary(folder: Path, name: str) -> Path:
    """Write the vocabulary `name` into `folder`, with the file name that models use."""
    folder.mkdir(parents=True, exist_ok=True)
    if name in _CARRIED:
        source, target = _CARRIED[name]
        return Path(shutil.copy(_DATA / source, folder / target))
    made = json.loads((_DATA / "tekken_240911.json").read_text(encoding="utf-8"))
    del made["image"]
    made["config"]["version"] = _VERSIONS[name]
    made["special_tokens"] = [
        {"rank": i, "token_str": token.value, "is_control": True} for i, token in enumerate(SpecialTokens)
    ]
    if name == "tekken-v15":
        effort = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
        made["model_settings_builder"] = {"reasoning_effort": effort}
    file = folder / "tekken.json"
    file.write_text(json.dumps(made), encoding="utf-8")
    return file
