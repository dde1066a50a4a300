"""What an engine's `/tokenize` is asked, in the words of each engine.

An engine renders with its own template, so its ids are exact without any configuration, as long as the question says all
that the request would have. What it cannot say is refused here.
"""

from __future__ import annotations

from typing import Any

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.conversation import has_media
from matrixinfer.prompt.openai import CHAT_PATH

SGLANG = "sglang"
"""The name by which SGLang owns its models, in its `/v1/models`."""


def question(prompt: Prompt, model: str, engine: str | None) -> dict[str, Any]:
    """The body for an engine of kind `engine`, as it names itself; any but SGLang is asked as vLLM 0.32 is.

    Raises `TokenizeError` when the answer would not be the ids that the engine caches for the request.
    """
    chat = prompt.chat
    if chat is None:
        if prompt.text is None:
            raise ValueError("a prompt of token ids needs no tokenizer")
        return {"model": model, "prompt": prompt.text, "add_special_tokens": prompt.add_special_tokens}
    if has_media(chat.messages):
        raise TokenizeError("the prompt carries images, audio or video, and no tokenizer is configured")
    if chat.joins_system or chat.thinking_off or not chat.in_schema_order:
        raise TokenizeError(f"an engine reshapes chats of {prompt.path} in a way that its /tokenize does not")
    if engine == SGLANG:
        return {"model": model} | _sglang_chat(prompt, chat)
    return {"model": model, "add_special_tokens": prompt.add_special_tokens} | _vllm_chat(chat)


def _vllm_chat(chat: Chat) -> dict[str, Any]:
    # The endpoint has no field for documents, but the template's variables reach it all the same.
    variables = (chat.chat_template_kwargs or {}) | ({"documents": chat.documents} if chat.documents else {})
    optional = {"tools": chat.tools, "chat_template": chat.chat_template, "chat_template_kwargs": variables or None}
    return {
        "messages": chat.messages,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        **{key: value for key, value in optional.items() if value is not None},
    }


def _sglang_chat(prompt: Prompt, chat: Chat) -> dict[str, Any]:
    """A chat as SGLang reads it; versions whose `/tokenize` knows no chats refuse it, as it has no `prompt`."""
    if prompt.path != CHAT_PATH or chat.own_template:
        raise TokenizeError(f"SGLang's /tokenize knows neither {prompt.path} nor templates of requests")
    optional = {"tools": chat.tools, "chat_template_kwargs": chat.chat_template_kwargs}
    return {
        "messages": chat.messages,
        "continue_final_message": chat.continue_final_message,
        **{key: value for key, value in optional.items() if value is not None},
    }
