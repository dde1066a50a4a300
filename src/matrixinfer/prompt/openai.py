"""Reads chats and completions of the OpenAI API as vLLM does."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.prompt import fields
from matrixinfer.prompt.base import Chat, Prompt, Rendered, SentFields, TokenId
from matrixinfer.prompt.read_chats import LEAST_BYTES, ReadChat, ReadChats, SentTools, Span

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"


class _ChatRequest(fields.ChatRequest, kw_only=True):
    tools: Raw = fields.NULL
    documents: list[fields.Object] | None = None
    reasoning_effort: str | float | None = None
    reasoning: Any = None
    tool_choice: Any = None
    input_ids: Raw = fields.NULL
    echo: bool | None = None
    prompt_logprobs: Any = None


class _CompletionRequest(fields.Request, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]] | None = None
    prompt_embeds: Raw = fields.NULL
    suffix: str | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: Any = None
    prompt_logprobs: Any = None


_CHAT = msgspec.json.Decoder(_ChatRequest)
_COMPLETION = msgspec.json.Decoder(_CompletionRequest)
_IDS = msgspec.json.Decoder(list[TokenId])


def chat(path: str, body: bytes, lately: ReadChats | None = None, values: int | None = None) -> Prompt:
    """Read a request to `/v1/chat/completions`. Raises `InvalidRequest`.

    Of a chat that continues one in `lately`, only the rest is decoded; `values` is what `ReadChats.keep` takes. Tools reach the template even with `tool_choice:
    none`, as in vLLM unless it runs with `--exclude-tools-when-tool-choice-none`. With `echo`, vLLM computes
    log-probabilities of the whole prompt.
    """
    if lately is not None and (earlier := lately.find(body)) is not None:
        with suppress(InvalidRequest):  # reading the whole body raises it again, with the right places in it
            if (continued := _continued(path, body, lately, earlier, values)) is not None:
                return continued
        lately = None
    request = fields.decode(_CHAT, body)
    tools = fields.decode(fields.OBJECTS, request.tools, "tools")
    messages = fields.messages(request.messages)
    rendered = None
    if lately is not None and len(body) >= LEAST_BYTES:
        sent = SentTools.of(bytes(request.tools), tools)
        span, salt = Span.of(request.messages, body), request.cache_salt
        rendered = lately.keep(body, span, messages, sent, cache_salt=salt, values=values)
    return _prompt(path, len(body), request, messages, tools, bytes(request.messages), rendered)


def _continued(path: str, body: bytes, lately: ReadChats, earlier: ReadChat, values: int | None) -> Prompt | None:
    """A chat that continues an earlier one; None if it must be read as a whole. Raises `InvalidRequest`."""
    stood_in = earlier.stood_in(body)
    if stood_in is None:
        return None
    request = fields.decode(_CHAT, stood_in)
    more = earlier.more(request.messages)
    if more is None or request.cache_salt != earlier.cache_salt:
        return None
    messages = [*earlier.messages, *(fields.messages(Raw(more)) if more else ())]
    sent = bytes(request.tools)
    tools = earlier.tools
    if sent != tools.sent:
        tools = SentTools.of(sent, fields.decode(fields.OBJECTS, request.tools, "tools"))
    span, salt = earlier.span(request.messages), request.cache_salt
    rendered = lately.keep(body, span, messages, tools, cache_salt=salt, earlier=earlier, values=values)
    return _prompt(path, len(body), request, messages, tools.tools, body[span.start : span.stop], rendered)


def _prompt(
    path: str,
    size: int,
    request: _ChatRequest,
    messages: list[fields.Object],
    tools: list[fields.Object] | None,
    sent: bytes,
    rendered: Rendered | None,
) -> Prompt:
    """The prompt of a chat whose messages were sent as the bytes `sent`."""
    effort = request.reasoning_effort
    return fields.prompt(
        path,
        request,
        size,
        prefix=sent if not tools else bytes(request.tools) + sent,
        chat=Chat(
            messages=messages,
            tools=tools,
            documents=request.documents,
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=request.continue_final_message is True,
            chat_template=request.chat_template,
            chat_template_kwargs=fields.template_variables(
                request.chat_template_kwargs, effort=effort if isinstance(effort, str) else None
            ),
            sent=SentFields(
                template_kwargs=request.chat_template_kwargs,
                reasoning_effort=effort,
                reasoning=request.reasoning,
                tool_choice=request.tool_choice,
                input_ids=_ids(request.input_ids),
            ),
            rendered=rendered,
        ),
        add_special_tokens=request.add_special_tokens is True,
        truncates="left",
        reads_cache=request.prompt_logprobs is None and request.echo is not True,
    )


def completion(path: str, body: bytes) -> Prompt:
    """Read a request to `/v1/completions`. Routing uses the first prompt; embeddings come first. Raises `InvalidRequest`."""
    request = fields.decode(_COMPLETION, body)
    inexact: str | None = None
    if bytes(request.prompt_embeds) != b"null":
        inexact = "the prompt consists of embeddings"
        first = fields.FirstPrompt(text=None, token_ids=None, prefix=bytes(request.prompt_embeds), alone=False)
    elif request.prompt is not None:
        first = fields.first_prompt(request.prompt, "prompt")
    else:
        raise fields.required("prompt")
    if request.suffix is not None:
        inexact = inexact or "only the engine knows how it inserts a suffix"
    echoed = request.echo is True and request.logprobs is not None
    return fields.prompt(
        path,
        request,
        len(body),
        prefix=first.prefix,
        text=first.text,
        token_ids=first.token_ids,
        add_special_tokens=request.add_special_tokens is not False,
        inexact=inexact,
        truncates="left",
        reads_cache=request.prompt_logprobs is None and not echoed,
        more_bytes=first.more_bytes,
        more_tokens=first.more_tokens,
        counted=first.alone,
    )


def _ids(sent: Raw) -> TokenIds | None:
    """The field `input_ids`, which only SGLang reads and so only SGLang validates."""
    if bytes(sent) == b"null":
        return None
    try:
        return np.array(_IDS.decode(sent), dtype=np.uint32)
    except UNREADABLE:
        return None
