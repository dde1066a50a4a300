"""Loads a tokenizer that was found, and compares its token ids with those of engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

import msgspec

from matrixinfer.blocks import TokenIds
from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.prompt import loader
from matrixinfer.prompt.base import Prompt, Tokenizer
from matrixinfer.prompt.dialect import Dialect, dialect_of
from matrixinfer.prompt.fleet import Served
from matrixinfer.prompt.openai import COMPLETIONS_PATH
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.prompt.requests import parse
from matrixinfer.prompt.samples import HARD_TEXT, compare
from matrixinfer.prompt.source import Checked


class EngineCheck:
    """Compares tokenizers with engines, which have `answer_seconds` for each sample."""

    def __init__(
        self, settings: TokenizationConfig, remote: RemoteTokenizer, *, block_size: int, answer_seconds: float
    ) -> None:
        self._settings = settings
        self._remote = remote
        self._block_size = block_size
        self._answer_seconds = answer_seconds

    async def first(self, config: ModelConfig, engines: Iterable[Served]) -> tuple[Tokenizer, dict[str, Checked]]:
        """Load the tokenizer of `config` and compare it with every engine.

        Raises `TokenizeError` if no engine answers, and `ConfigError` if the tokenizer cannot be loaded.
        """
        engines = list(engines)
        await self._reach(engines)  # loading takes seconds, and would be in vain
        tokenizer = await asyncio.to_thread(self._load, config)
        return tokenizer, await self.compare(tokenizer, engines)

    async def compare(self, tokenizer: Tokenizer, engines: Iterable[Served]) -> dict[str, Checked]:
        """Compare the samples with those engines, one after the other."""
        results = {}
        for each in engines:
            dialect = dialect_of(each.engine.engine, each.engine.version)
            ours = partial(_ids, tokenizer, dialect)
            samples = await compare(ours, self._remote, each.engine, model=each.model, seconds=self._answer_seconds)
            results[each.name] = Checked.of(each.name, samples)
        return results

    async def _reach(self, engines: Iterable[Served]) -> None:
        """Check that an engine can be asked at all. Raises `TokenizeError`."""
        for each in list(engines)[:1]:
            prompt = parse(COMPLETIONS_PATH, msgspec.json.encode({"model": each.model, "prompt": HARD_TEXT}))
            await self._remote.tokenize(prompt, [each.engine], each.model, timeout_seconds=self._answer_seconds)

    def _load(self, config: ModelConfig) -> Tokenizer:
        return loader.load(config, where="$", block_size=self._block_size, cache_bytes=self._settings.cache_bytes)


async def _ids(tokenizer: Tokenizer, dialect: Dialect, prompt: Prompt) -> TokenIds | None:
    """The tokenizer's own ids of a sample; None if it leaves such a prompt to the engine."""
    chat = prompt.chat
    if chat is not None and isinstance(tokenizer, loader.TextTokenizer) and tokenizer.asks_engine(chat, dialect):
        return None
    return (await asyncio.to_thread(tokenizer.tokenize, prompt, dialect)).ids
