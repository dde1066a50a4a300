"""Maps each path that takes a prompt to the function that reads its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TypeAlias

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt import anthropic, openai, pooling, responses
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.bounds import DEFAULT_BOUNDS, LARGE_BYTES, MEDIA_BYTES, Bounds, TooMuch, values_of
from matrixinfer.prompt.large import Claim, may_be_ids, may_hold_media, read_large
from matrixinfer.prompt.read_chats import ReadChats

Reader: TypeAlias = Callable[[str, bytes], Prompt]

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        openai.CHAT_PATH: openai.chat,
        openai.COMPLETIONS_PATH: openai.completion,
        responses.RESPONSES_PATH: responses.response,
        anthropic.MESSAGES_PATH: anthropic.message,
        anthropic.COUNT_PATH: anthropic.count,
        "/v1/embeddings": pooling.embeddings,
        "/score": pooling.score,
        "/v1/score": pooling.score,
        "/rerank": pooling.rerank,
        "/v1/rerank": pooling.rerank,
        "/v2/rerank": pooling.rerank,
    }
)
"""Path to reader. A reader takes the path and the body, and raises `InvalidRequest`."""


def parse(
    path: str,
    body: bytes,
    bounds: Bounds = DEFAULT_BOUNDS,
    claim: Claim = lambda _: True,
    chats: ReadChats | None = None,
) -> Prompt:
    """Read a request within `bounds`. Raises `InvalidRequest`, whose `param` names the invalid field.

    `claim` takes memory, in bytes, for what is decoded, and returns whether there is room. Beyond the bounds, and without
    memory, the prompt stays unread; `Prompt.inexact` says why. A chat that continues one of `chats` is decoded only from
    where it goes on; that changes nothing else.
    """
    reader = READERS.get(path)
    if reader is None:
        raise InvalidRequest(f"{path} is not an API that takes a prompt")
    if reader is not openai.chat:
        chats = None
    if len(body) <= LARGE_BYTES:
        return reader(path, body) if chats is None else openai.chat(path, body, chats)
    known, values = (0, 0) if chats is None else chats.counted(body)
    rest = memoryview(body)[known:]
    is_plain = len(body) <= bounds.max_bytes and not may_be_ids(rest)
    if is_plain and (len(body) <= MEDIA_BYTES or not may_hold_media(body)):
        values += values_of(rest)
        with suppress(TooMuch):  # `read_large` says so
            if claim(bounds.cost(body, values)):
                return reader(path, body) if chats is None else openai.chat(path, body, chats, values)
    return read_large(reader, path, body, bounds, claim)
