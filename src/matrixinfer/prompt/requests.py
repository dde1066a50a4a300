"""Maps each path that takes a prompt to the function that reads its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt import anthropic, openai, pooling, responses
from matrixinfer.prompt.base import Prompt

READERS: Mapping[str, Callable[[str, bytes], Prompt]] = MappingProxyType(
    {
        openai.CHAT_PATH: openai.chat,
        openai.COMPLETIONS_PATH: openai.completion,
        "/v1/responses": responses.response,
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


def parse(path: str, body: bytes) -> Prompt:
    """Read a request. Raises `InvalidRequest`, whose `param` names the invalid field."""
    reader = READERS.get(path)
    if reader is None:
        raise InvalidRequest(f"{path} is not an API that takes a prompt")
    return reader(path, body)
