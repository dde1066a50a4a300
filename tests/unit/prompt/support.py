"""Builds small tokenizers for tests."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from matrixinfer.prompt.manager import TokenizerManager

TEXTS = tuple(pydoc_data.topics.topics.values())


def tokenizer(*, normalizer: normalizers.Normalizer | None = None, bos: bool = False, eos: bool = False) -> Tokenizer:
    """Train a byte-level BPE of 600 tokens with `<s>` 0, `</s>` 1 and the ChatML marks."""
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(each, special=True) for each in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS[:3], trainer)
    if bos or eos:
        made.post_processor = processors.TemplateProcessing(
            single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""),
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    return made


def folder(path: Path, made: Tokenizer, **config: object) -> Path:
    """Write a model's folder with this tokenizer and this `tokenizer_config.json`."""
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@contextmanager
def read_in_threads(manager: TokenizerManager) -> Iterator[list[bytes]]:
    """Notes the bodies that `manager` reads in a thread within the context."""
    used: list[bytes] = []
    lanes = manager._lanes  # noqa: SLF001 - to see what runs in its threads
    read = lanes.read

    async def noting(work: Any, path: str, body: bytes, *rest: Any) -> Any:
        used.append(body)
        return await read(work, path, body, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "read", noting)
        yield used
