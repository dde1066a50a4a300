"""Reads a trace file of any known format; text is tokenized by the gateway's own tokenizers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from matrixinfer.blocks import TokenIds
from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.errors import ConfigError
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.requests import parse
from matrixinfer.study import access_trace, formats
from matrixinfer.study.conversations import Message, Tokenize, conversations
from matrixinfer.study.trace import Trace

_MODEL = "model"
_TIMEOUT_SECONDS = 60.0


def read(
    path: Path,
    *,
    tokenizer: str | None,
    chat_template: str = "chatml",
    block_size: int | None = None,
    seed: int = 0,
    most_sessions: int | None = None,
) -> Trace:
    """Read a file in the format that its first line shows. Raises `TraceError`, and `ConfigError` without a tokenizer."""
    size = {} if block_size is None else {"block_size": block_size}
    if ".csv" in path.suffixes:
        return formats.lengths(path, **size)
    keys = formats.keys_of(path)
    if keys >= access_trace.KEYS:
        return access_trace.access_log(path, block_size=block_size)
    if "hash_ids" in keys:
        return formats.mooncake(path, block_size=block_size)
    if "requests" in keys:
        return formats.agents(path, most_sessions=most_sessions, **size)
    if "messages" in keys:
        if tokenizer is None:
            raise ConfigError(
                "--tokenizer", "conversations are text: name the folder of a tokenizer, or install the extra `demo`"
            )
        with _tokenizing(tokenizer, chat_template) as tokenize:
            return conversations(path, tokenize, seed=seed, **size)
    raise formats.TraceError(
        f"{path}: unknown format: expected lines with `hash_ids`, with `requests` or with `messages`, or an access log, "
        f"found {', '.join(f'`{key}`' for key in sorted(keys))}"
    )


@contextmanager
def _tokenizing(tokenizer: str, chat_template: str) -> Iterator[Tokenize]:
    model = ModelConfig(name=_MODEL, tokenizer=tokenizer, chat_template=chat_template)
    with asyncio.Runner() as runner:
        tokenizers = TokenizerManager([model], TokenizationConfig(timeout_seconds=_TIMEOUT_SECONDS), None)
        runner.run(tokenizers.__aenter__())
        try:

            def tokenize(messages: Sequence[Message], tools: Sequence[Any] | None) -> TokenIds:
                is_answered = bool(messages) and messages[-1].get("role") == "assistant"
                body = {"model": _MODEL, "messages": messages, "add_generation_prompt": not is_answered}
                if tools:
                    body["tools"] = tools
                prompt = parse(CHAT_PATH, msgspec.json.encode(body))
                return runner.run(tokenizers.tokenize(prompt, model=_MODEL, engines=())).tokens.ids

            yield tokenize
        finally:
            runner.run(tokenizers.__aexit__(None, None, None))
