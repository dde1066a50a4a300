"""The routing-relevant fields of the OpenAI-compatible APIs.

Only what decides a prompt's token ids, its model and its cache namespace is read. Unknown fields pass, and what does
not matter for routing is left for the engine to judge: the request is forwarded as the client sent it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar, cast

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt.base import Chat, Prompt, TokenId

T = TypeVar("T")

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"


class _Request(Struct, kw_only=True):
    model: str
    stream: bool | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None


class _ChatRequest(_Request, kw_only=True):
    messages: Raw
    tools: Raw = Raw(b"null")
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class _CompletionRequest(_Request, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]


_CHAT = msgspec.json.Decoder(_ChatRequest)
_COMPLETION = msgspec.json.Decoder(_CompletionRequest)
_MESSAGES = msgspec.json.Decoder(Annotated[list[dict[str, Any]], Meta(min_length=1)])
_TOOLS = msgspec.json.Decoder(list[dict[str, Any]] | None)


def parse(path: str, body: bytes) -> Prompt:
    """Read a request to `/v1/chat/completions` or `/v1/completions`.

    Of a list of prompts the first decides. Raises `InvalidRequest`, whose `param` names the field at fault.
    """
    if path == CHAT_PATH:
        return _chat(_decode(_CHAT, body), len(body))
    if path == COMPLETIONS_PATH:
        return _completion(_decode(_COMPLETION, body), len(body))
    raise InvalidRequest(f"{path} is not an API that takes a prompt")


def _chat(request: _ChatRequest, size: int) -> Prompt:
    messages = _decode(_MESSAGES, request.messages, "messages")
    tools = _decode(_TOOLS, request.tools, "tools")
    chat = Chat(
        messages=messages,
        tools=tools,
        documents=request.documents,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=request.continue_final_message is True,
        chat_template=request.chat_template,
        chat_template_kwargs=_template_kwargs(request),
    )
    return Prompt(
        path=CHAT_PATH,
        model=request.model,
        stream=request.stream is True,
        chat=chat,
        text=None,
        token_ids=None,
        add_special_tokens=request.add_special_tokens is True,
        cache_salt=request.cache_salt or None,
        size=size,
        prefix=bytes(request.messages) if not tools else bytes(request.tools) + bytes(request.messages),
    )


def _template_kwargs(request: _ChatRequest) -> dict[str, Any] | None:
    """Variables of the template. As in vLLM the reasoning effort is one, and turns thinking on or off."""
    effort = request.reasoning_effort
    if effort is None:
        return request.chat_template_kwargs
    thinking = {"enable_thinking": effort != "none"}
    return thinking | (request.chat_template_kwargs or {}) | {"reasoning_effort": effort}


def _completion(request: _CompletionRequest, size: int) -> Prompt:
    text, ids = _first(request.prompt)
    return Prompt(
        path=COMPLETIONS_PATH,
        model=request.model,
        stream=request.stream is True,
        chat=None,
        text=text,
        token_ids=None if ids is None else np.array(ids, dtype=np.uint32),
        add_special_tokens=request.add_special_tokens is not False,
        cache_salt=request.cache_salt or None,
        size=size,
        prefix=msgspec.json.encode(ids) if text is None else text.encode(),
    )


def _first(prompt: str | list[str | int | list[int]]) -> tuple[str | None, list[int] | None]:
    """The prompt that decides, as text or as token ids."""
    if isinstance(prompt, str):
        return prompt, None
    if not prompt:
        raise InvalidRequest("`prompt` must not be empty", param="prompt")
    head = prompt[0]
    if isinstance(head, str):
        return head, None
    if isinstance(head, list):
        if not head:
            raise InvalidRequest("`prompt[0]` must not be empty", param="prompt")
        return None, head
    if set(map(type, prompt)) != {int}:
        raise InvalidRequest("`prompt` must not mix token ids with anything else", param="prompt")
    return None, cast("list[int]", prompt)


def _decode(decoder: msgspec.json.Decoder[T], data: bytes | Raw, param: str | None = None) -> T:
    """Decode `data`, the whole body or the field `param` of it."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        place = f"{param or ''}{where.removesuffix('`')}".lstrip(".")
        missing = re.search(r"missing required field `([^`]+)`", message)
        if missing:
            place = f"{place}.{missing[1]}".lstrip(".")
            raise InvalidRequest(f"`{place}` is required", param=place) from error
        raise InvalidRequest(
            f"{message[:1].lower()}{message[1:]} in `{place or 'the body'}`", param=place or None
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not UTF-8", param=param) from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply", param=param) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", param=param) from error
