"""Builds requests to an engine's `/tokenize`, in the form that each engine expects.

An engine renders chats with its own template, so its ids are exact without configuration, as long as the request to
`/tokenize` can express everything in the client's request. Prompts for which it cannot are refused here.
"""

from __future__ import annotations

from typing import Any

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.conversation import has_media
from matrixinfer.prompt.openai import CHAT_PATH

SGLANG = "sglang"
"""The owner of SGLang's models, as its `/v1/models` names it."""


def tokenize_request(prompt: Prompt, model: str, engine: str | None) -> dict[str, Any]:
    """The body of a `/tokenize` request, to be encoded as JSON.

    `engine` is the engine's own name of its kind; every kind but SGLang gets the form of vLLM 0.32. Raises
    `TokenizeError` if the answer would not be the ids that the engine caches for the client's request.
    """
    chat = prompt.chat
    if chat is None:
        if prompt.text is None:
            raise ValueError("a prompt of token ids needs no tokenizer")
        return {"model": model, "prompt": prompt.text, "add_special_tokens": prompt.add_special_tokens}
    if has_media(chat.messages):
        raise TokenizeError("the prompt contains images, audio or video, and no tokenizer is configured")
    if chat.joins_system or chat.thinking_off or not chat.in_schema_order:
        raise TokenizeError(f"engines reshape chats of {prompt.path}, but their /tokenize does not")
    if engine == SGLANG:
        return {"model": model} | _sglang_chat(prompt, chat)
    return {"model": model, "add_special_tokens": prompt.add_special_tokens} | _vllm_chat(chat)


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


def _sglang_chat(prompt: Prompt, chat: Chat) -> dict[str, Any]:
    """A chat in SGLang's form. Versions whose `/tokenize` does not support chats refuse it, because it has no `prompt`."""
    if prompt.path != CHAT_PATH or chat.own_template:
        raise TokenizeError(f"SGLang's /tokenize supports neither {prompt.path} nor chat templates in requests")
    optional = {"tools": chat.tools, "chat_template_kwargs": chat.chat_template_kwargs}
    return {
        "messages": chat.messages,
        "continue_final_message": chat.continue_final_message,
        **{key: value for key, value in optional.items() if value is not None},
    }
