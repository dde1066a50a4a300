"""Reads requests for embeddings, scores and rankings as vLLM does. Routing uses the prompt that is computed first.

Models that lowercase text or prepend an instruction see other tokens. Their prompts are short, are rarely cached, and
match nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from matrixinfer.errors import InvalidRequest
from matrixinfer.prompt import fields
from matrixinfer.prompt.base import Chat, Prompt, TokenId

_Texts = str | fields.Object | list[str | fields.Object]


class _EmbeddingRequest(fields.ChatRequest, kw_only=True):
    messages: Raw = fields.NULL
    input: Raw = fields.NULL


class _ScoringRequest(fields.Request, kw_only=True):
    max_tokens_per_query: int | None = None


class _RerankRequest(_ScoringRequest, kw_only=True):
    query: str | fields.Object


class _ScoreRequest(_ScoringRequest, kw_only=True):
    queries: _Texts | None = None
    data_1: _Texts | None = None
    text_1: _Texts | None = None


_EMBEDDING = msgspec.json.Decoder(_EmbeddingRequest)
_RERANK = msgspec.json.Decoder(_RerankRequest)
_SCORE = msgspec.json.Decoder(_ScoreRequest)
_INPUT = msgspec.json.Decoder(str | list[str | TokenId | fields.Object | list[TokenId | fields.Object]])


def embeddings(path: str, body: bytes) -> Prompt:
    """Read a request to `/v1/embeddings`: texts, token ids or chats in `input`, or chats in `messages`.

    Raises `InvalidRequest`.
    """
    request = fields.decode(_EMBEDDING, body)
    param = "input" if bytes(request.messages) == b"null" else "messages"
    raw = request.input if param == "input" else request.messages
    if bytes(raw) == b"null":
        raise fields.required("input")
    value: Any = fields.decode(_INPUT, raw, param)
    head = value[0] if isinstance(value, list) and value else None
    batch = isinstance(head, list) and bool(head) and isinstance(head[0], dict)
    messages: Any = head if batch else value
    if batch or isinstance(head, dict):
        if not all(isinstance(message, dict) for message in messages):
            raise InvalidRequest(f"`{param}` must not mix messages with anything else", param=param)
        return _chat(path, request, messages, len(body), count=len(value) if batch else 1)
    if param == "messages":
        raise InvalidRequest("`messages` must be a list of messages", param=param)
    first = fields.first_prompt(value, param)
    return fields.prompt(
        path,
        request,
        len(body),
        prefix=first.prefix,
        text=first.text,
        token_ids=first.token_ids,
        add_special_tokens=request.add_special_tokens is not False,
        truncates="right",
        more_bytes=first.more_bytes,
        more_tokens=first.more_tokens,
        counted=first.alone,
    )


def rerank(path: str, body: bytes) -> Prompt:
    """Read a request to `/rerank`; see `score`. Raises `InvalidRequest`."""
    request = fields.decode(_RERANK, body)
    return _query(path, request, request.query, len(body))


def score(path: str, body: bytes) -> Prompt:
    """Read a request to `/score`. The first query is the prompt. Raises `InvalidRequest`.

    A bi-encoder computes the first query first. A cross-encoder appends the document to the query, so the ids are
    certain only up to the query's last tokens; a cross-encoder with its own template sees another text.
    """
    request = fields.decode(_SCORE, body)
    queries = next(
        (each for each in (request.queries, request.data_1, request.text_1) if each is not None),
        None,
    )
    if queries is None:
        raise fields.required("queries")
    if queries == []:
        raise InvalidRequest("`queries` must not be empty", param="queries")
    return _query(path, request, queries[0] if isinstance(queries, list) else queries, len(body))


def _chat(path: str, request: _EmbeddingRequest, messages: list[fields.Object], size: int, *, count: int) -> Prompt:
    prefix = msgspec.json.encode(messages)
    return fields.prompt(
        path,
        request,
        size,
        prefix=prefix,
        more_bytes=max(0, size - len(prefix)) if count > 1 else 0,
        chat=Chat(
            messages=messages,
            add_generation_prompt=request.add_generation_prompt is True,
            continue_final_message=request.continue_final_message is True,
            chat_template=request.chat_template,
            chat_template_kwargs=fields.template_variables(request.chat_template_kwargs),
        ),
        add_special_tokens=request.add_special_tokens is True,
        truncates="right",
        counted=count == 1,
    )


def _query(path: str, request: _ScoringRequest, query: str | fields.Object, size: int) -> Prompt:
    inexact = None
    if not isinstance(query, str):
        inexact = "the query contains content that is not text"
    elif request.max_tokens_per_query:
        inexact = "the engine truncates the query"
    prefix = query.encode() if isinstance(query, str) else msgspec.json.encode(query)
    return fields.prompt(
        path,
        request,
        size,
        prefix=prefix,
        more_bytes=max(0, size - len(prefix)),  # the documents
        text=query if isinstance(query, str) else None,
        add_special_tokens=True,
        inexact=inexact,
        truncates="right",
        counted=False,
    )
