"""What the requests of all APIs share: decoding, and building a `Prompt` from their fields."""

from __future__ import annotations

import re
from array import array
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE, InvalidRequest
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.request_class import request_class

T = TypeVar("T")

Object = dict[str, Any]
NULL = Raw(b"null")

MESSAGES = msgspec.json.Decoder(Annotated[list[Object], Meta(min_length=1)])
OBJECTS = msgspec.json.Decoder(list[Object] | None)
_OBJECT = msgspec.json.Decoder(Object)
_RAW_LIST = msgspec.json.Decoder(Annotated[list[Raw], Meta(min_length=1)])
_WHOLE_BYTES = 512 * 1024
_MAX_NAME = 1024

_ENGINE_ARGUMENTS = frozenset({"chat_template", "conversation", "messages", "tokenize", "tools"})
"""Template variables that the engine sets. In `chat_template_kwargs` they override the request's own fields."""


class _Transfer(Struct):
    prompt_token_ids: Raw = NULL


class Request(Struct, kw_only=True):
    """The fields that all APIs of vLLM share. Only the engine validates fields that do not matter for routing."""

    model: Annotated[str, Meta(max_length=_MAX_NAME)] | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    kv_transfer_params: _Transfer | None = None
    user: Raw = NULL
    safety_identifier: Raw = NULL
    """What OpenAI calls the user now."""
    metadata: Raw = NULL
    """Anthropic's has a `user_id`."""


class _Metadata(Struct):
    user_id: str | None = None


_TEXT = msgspec.json.Decoder(str)
_METADATA = msgspec.json.Decoder(_Metadata)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FirstPrompt:
    """The first of a request's prompts, as text or token ids. Routing looks at this one only."""

    text: str | None
    token_ids: TokenIds | None
    prefix: bytes
    """See `Prompt.prefix`."""
    alone: bool
    """True when the request has no other prompt."""
    more_bytes: int = 0
    more_tokens: int = 0
    """See `Prompt.more_bytes` and `Prompt.more_tokens`."""


class ChatRequest(Request, kw_only=True):
    """The fields of a chat. Messages stay undecoded for `Prompt.prefix`."""

    messages: Raw
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Object | None = None


def decode(decoder: msgspec.json.Decoder[T], data: bytes | memoryview | Raw, param: str | None = None) -> T:
    """Decode `data`: the whole body, or its field `param`. Raises `InvalidRequest`."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        place = f"{param or ''}{where.removesuffix('`')}".lstrip(".")
        missing = re.search(r"missing required field `([^`]+)`", message)
        if missing:
            raise required(f"{place}.{missing[1]}".lstrip(".")) from error
        raise InvalidRequest(
            f"{message[:1].lower()}{message[1:]} in `{place or 'the body'}`", param=place or None
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not UTF-8", param=param) from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply", param=param) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", param=param) from error


MOST_FIELDS = 1_000_000
"""The most fields of a body, at any depth, counted by its colons. A body with more is not taken apart: its fields would take
more memory than a request may."""
_FIELDS = msgspec.json.Decoder(dict[str, Raw])


def top_level(body: bytes) -> dict[str, Raw]:
    """The fields of a JSON object. Raises `InvalidRequest`."""
    if body.count(b":") > MOST_FIELDS:
        raise InvalidRequest("the body has too many fields to change one")
    return decode(_FIELDS, body)


def messages(data: Raw | bytes | memoryview) -> list[Object]:
    """Decode the field `messages`. Raises `InvalidRequest`.

    A long list is decoded message by message, so that other threads can run in between: the decoder holds the GIL.
    """
    if memoryview(data).nbytes > _WHOLE_BYTES:
        try:
            return [_OBJECT.decode(each) for each in _RAW_LIST.decode(data)]
        except UNREADABLE:
            pass  # `decode` raises it below, with the field's path
    return decode(MESSAGES, data, "messages")


def first_prompt(prompts: str | list[Any], param: str) -> FirstPrompt:
    """The first of `prompts`, which is a text, a list of texts, token ids, or lists of token ids. Raises `InvalidRequest`."""
    if isinstance(prompts, str):
        return FirstPrompt(text=prompts, token_ids=None, prefix=prompts.encode(), alone=True)
    if not prompts:
        raise InvalidRequest(f"`{param}` must not be empty", param=param)
    head, alone = prompts[0], len(prompts) == 1
    if isinstance(head, str):
        more = sum(map(_bytes, prompts[1:]))
        return FirstPrompt(text=head, token_ids=None, prefix=head.encode(), alone=alone, more_bytes=more)
    more = 0
    if isinstance(head, int):
        head, alone = prompts, True
    elif not head:
        raise InvalidRequest(f"`{param}[0]` must not be empty", param=param)
    try:
        ids = array("I", head)  # checks and converts three times as fast as numpy
    except TypeError as error:
        raise InvalidRequest(f"`{param}` must not mix token ids with anything else", param=param) from error
    prefix = msgspec.json.encode(head)
    if not alone:
        more = sum(len(each) for each in prompts[1:] if isinstance(each, list))
    return FirstPrompt(
        text=None, token_ids=np.frombuffer(ids, dtype=np.uint32), prefix=prefix, alone=alone, more_tokens=more
    )


def _bytes(text: object) -> int:
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode())


def required(param: str) -> InvalidRequest:
    """The error for a missing field."""
    return InvalidRequest(f"`{param}` is required", param=param)


def template_variables(sent: Object | None, *, effort: str | None = None) -> Object | None:
    """The template's variables: those in `sent`, plus the reasoning effort, which also turns thinking on or off.

    As in vLLM, null and "auto" mean "not set". Returns None if no variable is set.
    """
    variables = dict(sent or {})
    if effort is not None:
        variables.setdefault("enable_thinking", effort != "none")
        variables["reasoning_effort"] = effort
    return {name: value for name, value in variables.items() if value is not None and value != "auto"} or None


def prompt(
    path: str,
    request: Request,
    size: int,
    *,
    prefix: bytes,
    chat: Chat | None = None,
    text: str | None = None,
    token_ids: TokenIds | None = None,
    add_special_tokens: bool,
    inexact: str | None = None,
    truncates: Literal["left", "right"] | None = None,
    reads_cache: bool = True,
    more_bytes: int = 0,
    more_tokens: int = 0,
    counted: bool = True,
) -> Prompt:
    """Build the `Prompt` of a request of `size` bytes.

    `truncates` is the side on which the engine truncates a prompt unless the request names one: left when generating,
    right when pooling, and None in APIs without truncation.
    """
    side = truncates and (request.truncation_side or truncates)
    keep = None if side is None else request.truncate_prompt_tokens
    if keep is not None and keep <= 0:
        keep = None  # -1 means the whole context, which prompts rarely exceed; 0 leaves nothing to compute
    if (
        keep is not None
        and side == "left"
        and request.truncation_side is None
        and add_special_tokens
        and token_ids is None
    ):
        inexact = inexact or "the engine keeps the tokenizer's own special tokens when it truncates the prompt"
    inexact = inexact or _replaced(request, chat)
    if inexact is not None:
        chat = text = token_ids = None
    return Prompt(
        path=path,
        model=request.model or "",
        names_model=bool(request.model),
        user=user_of(request),
        stream=request.stream is True,
        chat=chat,
        text=text,
        token_ids=token_ids,
        add_special_tokens=add_special_tokens,
        cache_salt=request.cache_salt or None,
        size=size,
        prefix=prefix,
        prefix_bytes=len(prefix),
        inexact=inexact,
        keep_last=keep if side == "left" else None,
        keep_first=keep if side == "right" else None,
        reads_cache=reads_cache,
        more_bytes=more_bytes,
        more_tokens=more_tokens,
        request_class=request_class(path, chat),
        counted=counted and request.truncate_prompt_tokens is None,
    )


def user_of(request: Request) -> str | None:
    """Whom a request names as its user; None if it names nobody, or with something else than text."""
    for sent in (request.user, request.safety_identifier):
        if sent is not NULL:
            with suppress(*UNREADABLE):
                return _TEXT.decode(sent) or None
    if request.metadata is not NULL:
        with suppress(*UNREADABLE):
            return _METADATA.decode(request.metadata).user_id or None
    return None


def _replaced(request: Request, chat: Chat | None) -> str | None:
    """Why the engine uses something else than the chat in the request, or None if it uses the chat."""
    if chat is None:
        return None
    if request.kv_transfer_params is not None and request.kv_transfer_params.prompt_token_ids != NULL:
        return "the request carries another engine's token ids"
    if chat.chat_template_kwargs and not _ENGINE_ARGUMENTS.isdisjoint(chat.chat_template_kwargs):
        return "`chat_template_kwargs` overrides variables that the engine sets"
    return None
