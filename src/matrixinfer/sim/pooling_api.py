"""Embeddings, scores, rankings and classes, made up from the prompts' token ids, in vLLM's shapes."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import msgspec

from matrixinfer.errors import InvalidRequest
from matrixinfer.sim.api import Json

DIMENSIONS = 16
Input = str | list[str | int | list[int]]


class PoolingRequest(msgspec.Struct, frozen=True):
    """A request to `/v1/embeddings`, `/pooling` or `/classify`: texts or token ids, or a chat."""

    model: str = ""
    input: Input | None = None
    messages: list[Json] | None = None
    encoding_format: str = "float"
    dimensions: int | None = None


class ScoreRequest(msgspec.Struct, frozen=True):
    """A request to `/score`. A single query is compared with every document."""

    model: str = ""
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each query with its document. Raises `InvalidRequest`."""
        left, right = self.queries or self.data_1 or self.text_1, self.documents or self.data_2 or self.text_2
        if left is None or right is None:
            raise InvalidRequest("expected `queries` and `documents`", param="queries")
        first = [left] if isinstance(left, str) else left
        second = [right] if isinstance(right, str) else right
        if len(first) == 1:
            first *= len(second)
        if len(first) != len(second):
            raise InvalidRequest("expected as many documents as queries, or one query", param="documents")
        return list(zip(first, second, strict=True))


class RerankRequest(msgspec.Struct, frozen=True):
    """A request to `/rerank`."""

    query: str
    documents: list[str]
    model: str = ""
    top_n: int = 0


def inputs(request: PoolingRequest) -> Sequence[str | list[int]]:
    """The texts or lists of token ids in a request. Raises `InvalidRequest`."""
    value: Any = request.input
    if value is None or value == []:
        raise InvalidRequest("expected `input`", param="input")
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


def vector(ids: bytes, dimensions: int | None) -> list[float]:
    """The embedding of a prompt."""
    count = DIMENSIONS if dimensions is None else dimensions
    digest = sha256(ids).digest()
    return [(digest[i % len(digest)] - 128) / 128 for i in range(count)]


def score(ids: bytes) -> float:
    """The score of a pair of texts, 0 to 1."""
    return sha256(ids).digest()[0] / 255


def embedding(index: int, values: list[float], encoding: str) -> Json:
    """One embedding; clients of OpenAI ask for `base64`."""
    shown = base64.b64encode(array("f", values).tobytes()).decode() if encoding == "base64" else values
    return {"index": index, "object": "embedding", "embedding": shown}


def pooled(index: int, values: list[float]) -> Json:
    """One answer of `/pooling`."""
    return {"index": index, "object": "pooling", "data": values}


def classified(index: int, values: list[float]) -> Json:
    """One answer of `/classify`, with two classes."""
    yes = (values[0] + 1) / 2
    label = "LABEL_1" if yes > 1 - yes else "LABEL_0"
    return {"index": index, "label": label, "probs": [1 - yes, yes], "num_classes": 2}


def envelope(request_id: str, model: str, created: int, data: list[Json], tokens: int) -> Json:
    """The whole answer."""
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    return {"id": request_id, "object": "list", "created": created, "model": model, "data": data, "usage": usage}


def ranking(request_id: str, model: str, request: RerankRequest, scores: Sequence[float], tokens: int) -> Json:
    """The answer of `/rerank`: the documents, the best first."""
    results: list[Json] = [
        {"index": i, "document": {"text": text, "multi_modal": None}, "relevance_score": scores[i]}
        for i, text in enumerate(request.documents)
    ]
    results.sort(key=lambda each: float(each["relevance_score"]), reverse=True)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"id": request_id, "model": model, "usage": usage, "results": results[: request.top_n or None]}
