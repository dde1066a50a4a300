"""Builds requests to an engine's `/tokenize`, in the form that each engine expects.

An engine renders chats with its own template, so its ids are exact without configuration, as long as the request to
`/tokenize` can express everything in the client's request. Prompts for which it cannot are refused here.
"""

from __future__ import annotations

import re
from typing import Any

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.conversation import has_media
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH

_HARMONY_NAME = re.compile(r"gpt[-_]oss", re.IGNORECASE)
"""Names of models whose chats vLLM renders in the harmony format, if they are called by their usual name."""


def tokenize_request(prompt: Prompt, model: str, dialect: Dialect) -> dict[str, Any]:
    """The body of a `/tokenize` request, to be encoded as JSON.

    Raises `TokenizeError` if the answer would not be the ids that the engine caches for the client's request.
    """
    chat = prompt.chat
    if chat is None:
        if prompt.text is None:
            raise ValueError("a prompt of token ids needs no tokenizer")
        special = prompt.add_special_tokens or (dialect.is_sglang and prompt.path == COMPLETIONS_PATH)
        return {"model": model, "prompt": prompt.text, "add_special_tokens": special}
    if has_media(chat.messages):
        raise TokenizeError("the prompt contains images, audio or video, and no tokenizer is configured")
    if dialect.is_sglang:
        return {"model": model} | _sglang_chat(prompt, chat, dialect)
    if chat.joins_system or chat.thinking_off or not chat.in_schema_order:
        raise TokenizeError(f"engines reshape chats of {prompt.path}, but their /tokenize does not")
    if _HARMONY_NAME.search(model):
        _check_harmony(chat, dialect)
    return {"model": model, "add_special_tokens": prompt.add_special_tokens} | _vllm_chat(chat)


def _check_harmony(chat: Chat, dialect: Dialect) -> None:
    if dialect is not Dialect.VLLM:
        raise TokenizeError("vLLM renders chats of gpt-oss in the harmony format, but before 0.33 not in /tokenize")
    if chat.sent is None or chat.sent.reasoning_effort is not None:
        raise TokenizeError("vLLM's /tokenize has no field for the reasoning effort of gpt-oss")


def _vllm_chat(chat: Chat) -> dict[str, Any]:
    # `/tokenize` has no field for documents, but they reach the template as a variable.
    variables = (chat.chat_template_kwargs or {}) | ({"documents": chat.documents} if chat.documents else {})
    optional = {"tools": chat.tools, "chat_template": chat.chat_template, "chat_template_kwargs": variables or None}
    return {
        "messages": chat.messages,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        **{key: value for key, value in optional.items() if value is not None},
    }


def _sglang_chat(prompt: Prompt, chat: Chat, dialect: Dialect) -> dict[str, Any]:
    """A chat in SGLang's form. Versions whose `/tokenize` does not support chats refuse it, because it has no `prompt`."""
    sent = chat.sent
    if prompt.path != CHAT_PATH or sent is None:
        raise TokenizeError(f"SGLang's /tokenize does not support {prompt.path}")
    if dialect is not Dialect.SGLANG_18 and _has_nulls(chat):
        raise TokenizeError("SGLang's /tokenize orders the keys of tools with null values differently")
    optional = {
        "tools": chat.tools,
        "tool_choice": sent.tool_choice,
        "reasoning_effort": sent.reasoning_effort,
        "reasoning": sent.reasoning,
        "chat_template_kwargs": sent.template_kwargs,
    }
    return {
        "messages": chat.messages,
        "continue_final_message": chat.continue_final_message,
        **{key: value for key, value in optional.items() if value is not None},
    }


def _has_nulls(chat: Chat) -> bool:
    functions = [function for tool in chat.tools or () if isinstance(function := tool.get("function"), dict)]
    return any(each.get(key, "") is None for each in functions for key in ("description", "parameters"))
