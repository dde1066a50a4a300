"""Chooses the tokenizer for a model, and enforces the limits that all tokenizers share.

A model's own tokenizer is configured, or found and put here later (`use`). Without one, an engine is asked. A caller may
decide not to wait for that: it gets `TokensLate`, and the token ids when they come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
from msgspec.structs import replace

from matrixinfer.blocks import TokenIds
from matrixinfer.config import LimitsConfig, ModelConfig, TokenizationConfig
from matrixinfer.errors import TokenizeError
from matrixinfer.prompt import loader
from matrixinfer.prompt.base import Prompt, Tokenized, Tokenizer, Tokens
from matrixinfer.prompt.bounds import LARGE_BYTES, SMALL_BYTES, Bounds
from matrixinfer.prompt.cache import CacheStats
from matrixinfer.prompt.dialect import Dialect, Dialects, dialect_of
from matrixinfer.prompt.effort import Abandoned, Effort
from matrixinfer.prompt.encoders import NeedsThread
from matrixinfer.prompt.late import LateAnswers
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.memory import Held, Memory
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH, is_short
from matrixinfer.prompt.read_chats import ReadChats
from matrixinfer.prompt.remote import Engine, RemoteTokenizer
from matrixinfer.prompt.requests import Reader, parse
from matrixinfer.prompt.workers import Lanes

_CHATS_PART = 4
"""Chats that were read lately may take one part in so many of what a tokenizer's cache may take, besides that."""
_MAX_QUEUED = 256
"""Limit of prompts that wait for a thread or are being tokenized in one."""
_IN_VAIN = 0.1
"""If lately less than this share of the answers came in time, nobody waits for the next one."""
_INLINE_ITEMS = 256
"""Chats with more messages, parts, tools, tool calls and documents are rendered in a thread, however short: 10 µs each."""
_LONG_ITEMS = 2048
"""With more, or with more bytes than `LARGE_BYTES`, they have to wait for others of that kind."""
_INLINE_SECONDS = 0.05
"""Rendering that takes longer is given up on the event loop, and done in a thread."""
_SLOW_SECONDS = 60.0
"""For so long after that, the model's prompts are tokenized in a thread."""


class TokenizerManager:
    """Tokenizes prompts with the model's own tokenizer if there is one, else by asking an engine.

    Use as an async context manager, which loads the tokenizers and owns the threads and the late answers. `on_changed`
    is called with a model whose token ids come from elsewhere from now on.
    """

    def __init__(
        self,
        models: Sequence[ModelConfig],
        settings: TokenizationConfig,
        remote: RemoteTokenizer | None,
        *,
        memory: Memory | None = None,
        block_size: int = 128,
        clock: Callable[[], float] = time.perf_counter,
        on_changed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._on_changed = on_changed
        self._models = models
        self._settings = settings
        self._remote = remote
        self._block_size = block_size
        self._clock = clock
        self._local: dict[str, Tokenizer] = {}
        self._memory = memory or Memory(LimitsConfig().memory_bytes)
        self._bounds = Bounds(max_bytes=settings.max_prompt_bytes, max_items=settings.max_prompt_items)
        self.chats = ReadChats(settings.cache_bytes // _CHATS_PART)
        """Chats read lately, which others may continue."""
        self._lanes = Lanes(limit=_MAX_QUEUED, seconds=settings.timeout_seconds)
        self._dialects = Dialects()
        self._slow: dict[str, float] = {}
        self._late = LateAnswers()

    async def __aenter__(self) -> Self:
        """Load the configured tokenizers. Raises `ConfigError` if one cannot be loaded."""
        self._local = await asyncio.to_thread(self._load)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._late.close()
        self._lanes.close()
        self._local = {}

    @property
    def caches(self) -> Mapping[str, CacheStats]:
        """The token cache counters of each model's own tokenizer, by model."""
        return {name: local.cache_stats for name, local in self._local.items() if isinstance(local, LocalTokenizer)}

    @property
    def working(self) -> int:
        """Bodies and prompts in threads, or waiting for one, also those that nobody waits for any more."""
        return len(self._lanes)

    @property
    def late(self) -> int:
        """Prompts whose token ids are still asked for while nobody waits for them."""
        return len(self._late)

    def use(self, model: str, tokenizer: Tokenizer | None) -> None:
        """From now on, tokenize prompts for `model`, the index's name of the model, with this tokenizer; None asks an engine."""
        self._slow.pop(model, None)
        if tokenizer is not self._local.get(model):
            self._on_changed(model)
        if tokenizer is None:
            self._local.pop(model, None)
        else:
            self._local[model] = tokenizer

    def engines_changed(self) -> None:
        """Forget what engines have answered: one may be another now."""
        if self._remote is not None:
            self._remote.forget()

    async def read(self, path: str, body: bytes, read: Reader | None = None) -> Prompt:
        """`parse` the body, in a thread if much of it is new. Raises `InvalidRequest`, and `Overloaded` if it would wait too long.

        A large prompt holds the memory that its content takes. `read` reads a body that brings no prompt instead.
        """
        if len(body) <= LARGE_BYTES:
            return parse(path, body, chats=self.chats) if read is None else read(path, body)
        if read is not None:
            return await self._lanes.read(read, path, body)
        claim = self._memory.hold()
        arguments = path, body, self._bounds, claim.take, self.chats
        is_here = path == CHAT_PATH and is_short(body, self.chats)
        prompt = parse(*arguments) if is_here else await self._lanes.read(parse, *arguments)
        return replace(prompt, claim=claim)

    async def tokenize(
        self, prompt: Prompt, *, model: str, engines: Sequence[Engine], may_be_late: bool = False
    ) -> Tokenized:
        """The token ids of `prompt` for `model`, the index's name of the model.

        `engines` serve the model; they are asked if the model has no tokenizer here, or if only an engine can render
        the prompt. Raises only `TokenizeError`, also if the request is too large or the deadline passes; with
        `may_be_late`, `TokensLate` when an engine does not answer within `tokenization.waitMilliseconds`.
        """
        if prompt.inexact is not None:
            raise TokenizeError(prompt.inexact)
        if prompt.token_ids is not None:
            return Tokenized(tokens=_truncated(Tokens(ids=prompt.token_ids), prompt), source="request")
        if prompt.size > self._settings.max_prompt_bytes:
            raise TokenizeError(f"the request is larger than {self._settings.max_prompt_bytes} bytes")
        if prompt.size > self._bounds.max_items and _items(prompt) > self._bounds.max_items:
            raise TokenizeError(
                f"the chat has more than {self._bounds.max_items} messages, parts, tools and tool calls"
            )
        if may_be_late and self._asks(prompt, model, engines):
            return await self._ask_briefly(prompt, model, engines)
        tokenizer, dialects = self._local.get(model), self._rendered_in(prompt, engines)
        if tokenizer is None or len(dialects) != 1 or not _is_local(prompt, tokenizer, dialects[0]):
            return await self._tokenize(prompt, model, engines)
        tokens = self._run_here(model, tokenizer, prompt, dialects[0])  # here and now, so it needs no deadline
        if tokens is None:
            return await self._tokenize(prompt, model, engines, in_thread=True)
        return Tokenized(tokens=_truncated_by(dialects[0], tokens, prompt), source="local")

    def _asks(self, prompt: Prompt, model: str, engines: Sequence[Engine]) -> bool:
        """Whether an engine must be asked."""
        tokenizer = self._local.get(model)
        if tokenizer is None:
            return True
        if prompt.chat is None or not (prompt.chat.own_template or isinstance(tokenizer, loader.TextTokenizer)):
            return False
        return any(_needs_engine(prompt, tokenizer, dialect) for dialect in self._dialects.of(engines))

    def _rendered_in(self, prompt: Prompt, engines: Sequence[Engine]) -> Sequence[Dialect]:
        """The dialects that the prompt must be rendered in, at least one."""
        if prompt.chat is None and prompt.path != COMPLETIONS_PATH:
            return (Dialect.VLLM,)
        return self._dialects.of(engines) or (Dialect.VLLM,)

    async def _tokenize(
        self, prompt: Prompt, model: str, engines: Sequence[Engine], *, in_thread: bool = False
    ) -> Tokenized:
        """Tokenize within the deadline. `in_thread`: what is done here is not fast enough for the event loop."""
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                return await self._tokenize_for_all(prompt, model, engines, in_thread)
        except TimeoutError as error:
            raise TokenizeError(f"no token ids within {self._settings.timeout_seconds} s") from error

    async def _tokenize_for_all(
        self, prompt: Prompt, model: str, engines: Sequence[Engine], in_thread: bool
    ) -> Tokenized:
        dialects = self._rendered_in(prompt, engines)
        first = await self._tokenize_for(prompt, model, engines, dialects[0], in_thread)
        for other in dialects[1:]:
            ids = (await self._tokenize_for(prompt, model, engines, other, in_thread)).tokens.ids
            if not np.array_equal(ids, first.tokens.ids):
                raise TokenizeError(
                    f"{dialects[0].value} and {other.value} serve the model and render this differently"
                )
        return first

    async def _tokenize_for(
        self, prompt: Prompt, model: str, engines: Sequence[Engine], dialect: Dialect, in_thread: bool
    ) -> Tokenized:
        """Tokenize as the engines of one dialect do."""
        sent = _sent_ids(prompt, dialect)
        if sent is not None:
            return Tokenized(tokens=Tokens(ids=sent), source="request")
        tokenizer = self._local.get(model)
        if tokenizer is None or _needs_engine(prompt, tokenizer, dialect):
            speakers = [each for each in engines if dialect_of(each.engine, each.version) is dialect]
            tokenized = await self._ask(prompt, model, speakers)
        else:
            tokens = None if in_thread else self._run_here(model, tokenizer, prompt, dialect)
            if tokens is None:
                tokens = await self._run_in_thread(tokenizer, prompt, dialect)
            tokenized = Tokenized(tokens=tokens, source="local")
        return replace(tokenized, tokens=_truncated_by(dialect, tokenized.tokens, prompt))

    def _load(self) -> dict[str, Tokenizer]:
        return {
            model.name: loader.load(
                model,
                where=f"$.models[{i}]",
                block_size=self._block_size,
                cache_bytes=self._settings.cache_bytes,
            )
            for i, model in enumerate(self._models)
            if model.tokenizer is not None
        }

    async def _run_in_thread(self, tokenizer: Tokenizer, prompt: Prompt, dialect: Dialect) -> Tokens:
        is_long = prompt.size > LARGE_BYTES or _items(prompt) > _LONG_ITEMS
        with self._memory.hold() as held:
            self._claim(prompt, held)
            return await self._lanes.tokenize(is_long, tokenizer.tokenize, prompt, dialect)

    def _run_here(self, model: str, tokenizer: Tokenizer, prompt: Prompt, dialect: Dialect) -> Tokens | None:
        """Tokenize on the event loop; None where that is not fast."""
        if prompt.size > tokenizer.inline_bytes or _items(prompt) > _INLINE_ITEMS or self._is_slow(model):
            return None
        try:
            with Effort(_INLINE_SECONDS):
                return tokenizer.tokenize(prompt, dialect)
        except NeedsThread:
            return None
        except Abandoned:
            self._slow[model] = self._clock() + _SLOW_SECONDS
            return None

    def _claim(self, prompt: Prompt, held: Held) -> None:
        """Take the memory of a prompt that has to wait, if it does not hold that already. Raises `TokenizeError`."""
        if prompt.size > SMALL_BYTES and prompt.claim is None:
            self._take(prompt, held)

    def _take(self, prompt: Prompt, held: Held) -> None:
        if not held.take(self._bounds.cost(prompt.prefix)):
            raise TokenizeError("other requests take the memory that it would need")

    def _is_slow(self, model: str) -> bool:
        return bool(self._slow) and self._clock() < self._slow.get(model, 0.0)

    async def _ask_briefly(self, prompt: Prompt, model: str, engines: Sequence[Engine]) -> Tokenized:
        """Ask an engine, but wait for the answer only briefly. Raises `TokensLate` if it is still to come."""
        self._late.check_room()
        asks = self._tokenize(self._outlasting(prompt), model, engines)
        return await self._late.wait(asks, self._patience(model))

    def _outlasting(self, prompt: Prompt) -> Prompt:
        """A prompt that may outlast its request: without a view into the body, and with the memory that it takes itself."""
        claim = prompt.claim
        if claim is None:
            claim = self._memory.hold()
            self._take(prompt, claim)
        return replace(prompt, prefix=b"", claim=claim)

    def _patience(self, model: str) -> float:
        """Seconds to wait for an engine's answer; 0 if almost all of its last answers took longer than the limit."""
        seconds = self._settings.wait_milliseconds / 1e3
        cost = None if self._remote is None else self._remote.costs.get(model)
        fastest = None if cost is None else cost.quantile(_IN_VAIN)
        return seconds if fastest is None or fastest <= seconds else 0.0

    async def _ask(self, prompt: Prompt, model: str, engines: Sequence[Engine]) -> Tokenized:
        if self._remote is None or not engines:
            raise TokenizeError(f"no tokenizer is configured for {model}, and there is no engine to ask")
        start = self._clock()
        with self._memory.hold() as held:
            self._claim(prompt, held)
            ids = await self._remote.tokenize(prompt, engines, model, timeout_seconds=self._settings.timeout_seconds)
        took = {"tokenize": (self._clock() - start) * 1e3}
        return Tokenized(tokens=Tokens(ids=ids, timings_ms=took), source="remote")


def _needs_engine(prompt: Prompt, tokenizer: Tokenizer, dialect: Dialect) -> bool:
    """Whether only an engine can render the prompt, and its `/tokenize` does so exactly."""
    if prompt.chat is None:
        return False
    if isinstance(tokenizer, loader.TextTokenizer):
        return tokenizer.asks_engine(prompt.chat, dialect)
    return prompt.chat.own_template and not dialect.is_sglang  # SGLang ignores a request's template


def _is_local(prompt: Prompt, tokenizer: Tokenizer, dialect: Dialect) -> bool:
    """Whether this tokenizer makes the token ids: the prompt brings none, and needs no engine."""
    return _sent_ids(prompt, dialect) is None and not _needs_engine(prompt, tokenizer, dialect)


def _sent_ids(prompt: Prompt, dialect: Dialect) -> TokenIds | None:
    """The token ids that a chat brings with it: a field of SGLang's."""
    sent = None if prompt.chat is None else prompt.chat.sent
    return sent.input_ids if dialect.is_sglang and sent is not None else None


def _truncated_by(dialect: Dialect, tokens: Tokens, prompt: Prompt) -> Tokens:
    """As `_truncated`, but for SGLang, which does not know the fields that ask for it."""
    return tokens if dialect.is_sglang else _truncated(tokens, prompt)


def _truncated(tokens: Tokens, prompt: Prompt) -> Tokens:
    """The tokens that remain after the engine truncates the prompt, if the request asks it to."""
    if prompt.keep_last is not None and not tokens.complete:
        raise TokenizeError("the prompt contains images, audio or video, and its beginning is truncated")
    if prompt.keep_last is not None and len(tokens.ids) > prompt.keep_last:
        return replace(tokens, ids=tokens.ids[-prompt.keep_last :], hashes=None)
    if prompt.keep_first is not None and len(tokens.ids) > prompt.keep_first:
        return replace(tokens, ids=tokens.ids[: prompt.keep_first], complete=True)
    return tokens


def _items(prompt: Prompt) -> int:
    """How many items the chat template processes one by one."""
    chat = prompt.chat
    if chat is None:
        return 0
    items = len(chat.messages) + len(chat.tools or ()) + len(chat.documents or ())
    for message in chat.messages:
        if isinstance(calls := message.get("tool_calls"), list):
            items += len(calls)
        if isinstance(parts := message.get("content"), list):
            items += len(parts)
    return items
