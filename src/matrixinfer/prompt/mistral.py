"""Mistral's own tokenizers and chat encoding, as implemented by `mistral-common`.

Mistral's models have no chat template: `mistral-common` turns messages into token ids directly, in a way that depends
on the version that the vocabulary names. The chat is prepared as vLLM 0.32 does with `--tokenizer-mode mistral`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Library

from matrixinfer.errors import ConfigError, TokenizeError
from matrixinfer.prompt.base import Chat, Prompt, Tokens
from matrixinfer.prompt.conversation import engine_tools, has_media
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.template_traits import TemplateTraits, adapt

_ID_CHARS = 9
"""vLLM keeps only the last characters of a tool call's id; Mistral's models do not know longer ids."""

_RESPONSES_PATH = "/v1/responses"
"""The only API whose tool call ids vLLM does not shorten."""

_ENCODING_ARGUMENTS = frozenset({"max_length", "padding", "tokenize", "truncation"})
"""Keys of `chat_template_kwargs` that change what vLLM's tokenizer returns."""

_EFFORT_VERSION = 15
"""The first vocabulary version that supports the reasoning effort."""

_TRAITS = TemplateTraits(joins_system=True, disabled_effort="none")
"""What vLLM assumes for a model without a chat template, and detects for vocabularies with a reasoning effort."""


class MistralTokenizer:
    """Encodes chats and texts exactly as vLLM does. Thread-safe."""

    name = "mistral-common"
    inline_bytes = 2 * 1024

    def __init__(
        self, library: Library[Any, Any, Any, Any, Any], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._library = library
        self._clock = clock

    @classmethod
    def load(cls, file: Path, *, where: str) -> MistralTokenizer:
        """Load `tekken.json` or a SentencePiece vocabulary such as `tokenizer.model.v3`.

        Raises `ConfigError` at the key `where`.
        """
        try:
            library = Library.from_file(str(file), mode=ValidationMode.test)
        except Exception as error:  # boundary: the library raises KeyError, AssertionError and others on odd files
            raise ConfigError(where, f"{file} is not a usable Mistral tokenizer: {error}") from error
        return cls(library)

    def tokenize(self, prompt: Prompt, dialect: Dialect = Dialect.VLLM) -> Tokens:
        """See `Tokenizer.tokenize`. A chat is not rendered to text first, so only `tokenize` is timed."""
        start = self._clock()
        if prompt.chat is not None:
            if dialect.is_sglang:
                raise TokenizeError("how SGLang renders chats with Mistral's own tokenizer is not known here")
            _check(prompt.chat)
        try:
            ids = self._encode(prompt)
        except Exception as error:  # noqa: BLE001 - boundary: the library's validation raises many types
            # Not `from error`: its messages quote the prompt.
            raise TokenizeError(f"{self.name} refused the prompt: {type(error).__name__}") from None
        took = (self._clock() - start) * 1e3
        return Tokens(ids=np.array(ids, dtype=np.uint32), timings_ms={"tokenize": took})

    def _encode(self, prompt: Prompt) -> list[int]:
        if prompt.chat is not None:
            return self._encode_chat(prompt.chat, short_ids=prompt.path != _RESPONSES_PATH)
        if prompt.text is None:
            raise ValueError("the prompt is neither chat, text nor token ids")
        return self._library.instruct_tokenizer.tokenizer.encode(prompt.text, bos=prompt.add_special_tokens, eos=False)

    def _encode_chat(self, chat: Chat, *, short_ids: bool) -> list[int]:
        chat = adapt(chat, _TRAITS)
        settings: dict[str, Any] = {}
        if int(self._library.version.value.removeprefix("v")) >= _EFFORT_VERSION:
            settings["reasoning_effort"] = (chat.chat_template_kwargs or {}).get("reasoning_effort")
        request: Any = ChatCompletionRequest.from_openai(
            messages=[_message(message, short_ids=short_ids) for message in chat.messages],
            tools=engine_tools(chat.tools),
            continue_final_message=chat.continue_final_message,
            **settings,
        )
        ids: list[int] = self._library.encode_chat_completion(request).tokens
        return ids


def _check(chat: Chat) -> None:
    """Refuse chats that vLLM refuses, and chats that it does not encode from their messages alone."""
    if chat.own_template:
        raise TokenizeError("the request supplies its own chat template")
    if has_media(chat.messages):
        raise TokenizeError("the prompt contains images, audio or video")
    if not _ENCODING_ARGUMENTS.isdisjoint(chat.chat_template_kwargs or ()):
        raise TokenizeError("`chat_template_kwargs` changes how the engine encodes the chat")
    last_is_answer = chat.messages[-1].get("role") == "assistant"
    if chat.add_generation_prompt and (last_is_answer or chat.continue_final_message):
        raise TokenizeError(
            "`add_generation_prompt` is set, but the chat ends with an assistant message or continues one"
        )
    if chat.continue_final_message and not last_is_answer:
        raise TokenizeError("`continue_final_message` is set, but the final message is not from the assistant")


def _message(message: Mapping[str, Any], *, short_ids: bool) -> dict[str, Any]:
    """A message as vLLM passes it to the library."""
    shaped = {key: value for key, value in message.items() if key != "reasoning_content"}
    if message.get("reasoning") is None:
        shaped["reasoning"] = message.get("reasoning_content")
    if message.get("role") == "assistant":
        shaped["tool_calls"] = [_tool_call(call, short_ids=short_ids) for call in message.get("tool_calls") or ()]
    elif short_ids and isinstance(ident := message.get("tool_call_id"), str):
        shaped["tool_call_id"] = ident[-_ID_CHARS:]
    return shaped


def _tool_call(call: Mapping[str, Any], *, short_ids: bool) -> dict[str, Any]:
    """Arguments that are not a JSON object become `{}`, as for every other model."""
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    given = arguments if isinstance(arguments, dict) else {}
    return {
        **call,
        "id": call["id"][-_ID_CHARS:] if short_ids else call["id"],
        "function": {**function, "arguments": given},
    }
