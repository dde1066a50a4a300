"""Reads chats and completions of the OpenAI API as vLLM does."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Raw, Struct

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.prompt import fields
from matrixinfer.prompt.base import Chat, Prompt, Rendered, SentFields, TokenId
from matrixinfer.prompt.bounds import LARGE_BYTES
from matrixinfer.prompt.read_chats import LEAST_BYTES, ReadChat, ReadChats, SentTools, Span, is_stand_in, stood_in

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


class _ChatAround(Struct):
    """What decides whether a chat may share the messages of another one."""

    messages: Raw
    cache_salt: str | None = None


_CHAT = msgspec.json.Decoder(_ChatRequest)
_AROUND = msgspec.json.Decoder(_ChatAround)
_COMPLETION = msgspec.json.Decoder(_CompletionRequest)
_IDS = msgspec.json.Decoder(list[TokenId])


def chat(path: str, body: bytes, lately: ReadChats | None = None, values: int | None = None) -> Prompt:
    """Read a request to `/v1/chat/completions`. Raises `InvalidRequest`.

    Of a chat that continues one in `lately`, only the rest is decoded; `values` is what `ReadChats.keep` takes. Tools reach
    the template even with `tool_choice: none`, as in vLLM unless it runs with `--exclude-tools-when-tool-choice-none`. With
    `echo`, vLLM computes log-probabilities of the whole prompt.
    """
    if len(body) < LEAST_BYTES:
        return _prompt(path, body, _read_twice(body), None)
    earlier = None if lately is None else lately.find(body)
    # Where the body is not valid, decoding it as a whole says what is wrong, and where.
    with suppress(InvalidRequest):
        read = _read_at_once(body) if earlier is None else _read_rest(body, earlier)
        if read is not None:
            return _prompt(path, body, read, _keep(body, read, lately, earlier, values))
    read = _read_twice(body)
    return _prompt(path, body, read, None if earlier is not None else _keep(body, read, lately, None, values))


def is_short(body: bytes, lately: ReadChats) -> bool:
    """Whether a large chat continues one in `lately` that was looked at, and little else of it is to be decoded."""
    earlier = lately.find(body)
    if earlier is None or earlier.values is None or len(body) - (earlier.stop - earlier.start) > LARGE_BYTES:
        return False
    reduced = earlier.stood_in(body)
    if reduced is None:
        return False
    try:
        around = _AROUND.decode(reduced)
    except UNREADABLE:
        return False
    return around.cache_salt == earlier.cache_salt and earlier.more(around.messages) is not None


class _Read(NamedTuple):
    """A chat's fields and messages."""

    request: _ChatRequest
    messages: list[fields.Object]
    sent: bytes
    """The messages as they were sent."""
    span: Span | None
    """Where they are; None if they are those of `request`."""
    tools: SentTools


def _read_at_once(body: bytes) -> _Read | None:
    """Decode each byte of a body once, if it is seen easily where its messages are. Raises `InvalidRequest`."""
    span = Span.guessed(body)
    reduced = None if span is None else stood_in(body, span)
    if span is None or reduced is None:
        return None
    request = fields.decode(_CHAT, reduced)
    if not is_stand_in(request.messages):
        return None
    sent = body[span.start : span.stop]
    return _Read(request, fields.messages(sent), sent, span, _tools(request))


def _read_twice(body: bytes) -> _Read:
    """Decode a body to find where its messages are, and then these. Raises `InvalidRequest`."""
    request = fields.decode(_CHAT, body)
    tools = _tools(request)
    return _Read(request, fields.messages(request.messages), bytes(request.messages), None, tools)


def _read_rest(body: bytes, earlier: ReadChat) -> _Read | None:
    """A chat that continues an earlier one; None if it must be read as a whole. Raises `InvalidRequest`."""
    reduced = earlier.stood_in(body)
    if reduced is None:
        return None
    request = fields.decode(_CHAT, reduced)
    more = earlier.more(request.messages)
    if more is None or request.cache_salt != earlier.cache_salt:
        return None
    messages = [*earlier.messages, *(fields.messages(more) if more else ())]
    tools = earlier.tools if bytes(request.tools) == earlier.tools.sent else _tools(request)
    span = earlier.span(request.messages)
    return _Read(request, messages, body[span.start : span.stop], span, tools)


def _tools(request: _ChatRequest) -> SentTools:
    return SentTools.of(bytes(request.tools), fields.decode(fields.OBJECTS, request.tools, "tools"))


def _keep(
    body: bytes, read: _Read, lately: ReadChats | None, earlier: ReadChat | None, values: int | None
) -> Rendered | None:
    if lately is None:
        return None
    span, salt = read.span or Span.of(read.request.messages, body), read.request.cache_salt
    return lately.keep(body, span, read.messages, read.tools, cache_salt=salt, earlier=earlier, values=values)


def _prompt(path: str, body: bytes, read: _Read, rendered: Rendered | None) -> Prompt:
    request, tools, sent = read.request, read.tools.tools, read.sent
    effort = request.reasoning_effort
    return fields.prompt(
        path,
        request,
        len(body),
        prefix=sent if not tools else bytes(request.tools) + sent,
        chat=Chat(
            messages=read.messages,
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
