"""Reads chats and completions of the OpenAI API as vLLM does."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Raw, Struct

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.prompt import fields, stand_in
from matrixinfer.prompt.base import Chat, Prompt, Rendered, SentFields, TokenId
from matrixinfer.prompt.bounds import LARGE_BYTES
from matrixinfer.prompt.read_chats import LEAST_BYTES, ReadChat, ReadChats, SentTools
from matrixinfer.prompt.stand_in import Span

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


def chat(path: str, body: bytes, chats: ReadChats | None = None, values: int | None = None) -> Prompt:
    """Read a request to `/v1/chat/completions`. Raises `InvalidRequest`.

    Of a chat that continues one of `chats`, only the rest is decoded; `values` is what `ReadChats.keep` takes. Tools reach
    the template even with `tool_choice: none`, as in vLLM unless it runs with `--exclude-tools-when-tool-choice-none`. With
    `echo`, vLLM computes log-probabilities of the whole prompt.
    """
    if len(body) < LEAST_BYTES:
        return _prompt(path, body, _read_twice(body), None)
    earlier = None if chats is None else chats.find(body)
    read = None
    with suppress(InvalidRequest):  # decoding the body as a whole says what is wrong, and where
        read = _read_at_once(body) if earlier is None else _read_rest(body, earlier)
    if read is None and earlier is not None:
        # It is not kept: it would be found in place of the chat that it begins with.
        return _prompt(path, body, _read_twice(body), None)
    read = read or _read_twice(body)
    rendered = None
    if chats is not None:
        span, salt = read.span or Span.of(read.request.messages, body), read.request.cache_salt
        rendered = chats.keep(body, span, read.messages, read.tools, cache_salt=salt, earlier=earlier, values=values)
    return _prompt(path, body, read, rendered)


def is_short(body: bytes, chats: ReadChats) -> bool:
    """Whether a large chat continues one of `chats` whose values were counted, and little else of it is to be decoded."""
    earlier = chats.find(body)
    if earlier is None or earlier.values is None or len(body) - (earlier.stop - earlier.start) > LARGE_BYTES:
        return False
    around = stand_in.without_known(body, earlier.start, earlier.stop)
    try:
        sent = None if around is None else _AROUND.decode(around)
    except UNREADABLE:
        return False
    return sent is not None and sent.cache_salt == earlier.cache_salt and stand_in.further(sent.messages) is not None


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
    """Decode each byte of a body once; None if it is not easily seen where its messages are. Raises `InvalidRequest`."""
    span = Span.guessed(body)
    around = None if span is None else stand_in.without_messages(body, span)
    if span is None or around is None:
        return None
    request = fields.decode(_CHAT, around)
    if not stand_in.is_alone(request.messages):
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
    around = stand_in.without_known(body, earlier.start, earlier.stop)
    if around is None:
        return None
    request = fields.decode(_CHAT, around)
    more = stand_in.further(request.messages)
    if more is None or request.cache_salt != earlier.cache_salt:
        return None
    messages = [*earlier.messages, *(fields.messages(more) if more else ())]
    tools = earlier.tools if bytes(request.tools) == earlier.tools.sent else _tools(request)
    span = earlier.span(request.messages)
    return _Read(request, messages, body[span.start : span.stop], span, tools)


def _tools(request: _ChatRequest) -> SentTools:
    return SentTools.of(bytes(request.tools), fields.decode(fields.OBJECTS, request.tools, "tools"))


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
